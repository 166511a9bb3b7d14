"""Train one adapter from the private facts of three owners, none of whom shows them to another or to the server.

    python docs/examples/owners.py models/recipes/federation.yaml runs/owners
"""

import sys

import hecompile

recipe, out, *shorter = sys.argv[1:]

# Each owner is a process of its own and trains on its own file. The server adds encrypted updates and opens only their sum.
rounds = hecompile.federate(recipe, [f"training.output_dir={out}", *shorter], say=print)

for done in rounds:
    print(f"round {done.round}: {len(done.contributors)} owners, {done.bytes_up / 1e6:.1f} MB up, {done.seconds:.1f} s")
print(f"adapter: {out}/adapter")
