"""Answer a prompt with a model that the worker multiplies encrypted.

    python docs/examples/answer.py models/tiny-llama build-answer
"""

import sys
from pathlib import Path

import hecompile

checkpoint, directory = sys.argv[1], Path(sys.argv[2])

# 1. Compile the checkpoint, unless it was compiled before. The worker's half would go to another machine.
if not directory.exists():
    hecompile.export(checkpoint, directory, hecompile.CompileOptions(batch_size=4, sequence_buckets=(64,)))

# 2. Open the plan. Here the worker runs in this process; `worker="tcp://host:7700"` names one elsewhere.
with hecompile.load(directory / "client", worker_bundle=directory / "worker") as session:
    # 3. Answer. The worker sees ciphertexts; text and tokens stay here.
    for reply in session.answer(["Question: Who treats Ada Stone?\nAnswer:"], max_new_tokens=8):
        print(repr(reply.answer))
    costs = session.costs
    print(f"{costs.bytes_up + costs.bytes_down} bytes, {costs.worker_seconds:.2f} s at the worker")
