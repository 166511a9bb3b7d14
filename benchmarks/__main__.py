"""`python -m benchmarks [--quick] [SECTION ...]`: run the sections and write results/README.md."""

from __future__ import annotations

import argparse
import sys
import time

from benchmarks import SECTIONS
from benchmarks.report import assemble, run_section_process, use_quick_directory


def main() -> int:
    """Exit status 1 when a section failed; the others are run and stored all the same."""
    sections = list(SECTIONS)
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="smallest sizes, to check that the code works")
    parser.add_argument("--assemble", action="store_true", help="only write the page again from the stored sections")
    parser.add_argument("sections", nargs="*", metavar="SECTION", help=f"of {', '.join(sections)}; all by default")
    options = parser.parse_args()
    if unknown := sorted(set(options.sections) - set(sections)):
        parser.error(f"no section {', '.join(unknown)}; there are {', '.join(sections)}")
    if options.quick:
        use_quick_directory()
    failed = []
    for name in [] if options.assemble else options.sections or sections:
        print(f"--- {name}", flush=True)
        started = time.perf_counter()
        if not run_section_process(name, options.quick):
            failed.append(name)
        print(f"--- {name}: {time.perf_counter() - started:.0f} s", flush=True)
    print(f"page: {assemble()}")
    if failed:
        print(f"failed: {', '.join(failed)}; their earlier results, if any, are kept", file=sys.stderr)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
