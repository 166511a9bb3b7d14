"""Take a Llama of one layer from export to logits, through a worker process and a socket; what either side refuses."""

from __future__ import annotations

import json
import shutil
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import peft
import pytest
import torch

from hecompile.bundles.ckks import CkksPlan, open_worker
from hecompile.bundles.kinds import CIRCUIT, PLAN, TABLE
from hecompile.compiler.ckks import CkksOptions, export_polynomial, lower_checkpoint
from hecompile.compiler.frontend import load_checkpoint
from hecompile.compiler.polynomial_options import CONFIG_KEY
from hecompile.errors import HecompileError, InputError, LegalityError, WorkerError, WorkerUnavailableError
from hecompile.graph.interpreter import Interpreter
from hecompile.graph.ir import ORIGIN
from hecompile.inspection.ckks_traffic import predicted_traffic
from hecompile.passes.polynomial.expand_polynomials import EMBEDDINGS, ExpandPolynomials
from hecompile.passes.polynomial.place_refreshes import PlaceRefreshes
from hecompile.runtime.ckks.answers import complete
from hecompile.runtime.ckks.client import CkksSession
from hecompile.runtime.ckks.messages import receive, send
from hecompile.runtime.worker.process import running_server
from tests.runtime.ckks.support import LEVELS, OPTIONS
from tests.support.training import make_tokenizer

TOKENS = np.array([[1, 70, 80], [1, 90, 100], [1, 5, 6]])


@pytest.fixture(scope="module")
def worker(build: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    address = f"unix://{tmp_path_factory.mktemp('w')}/s"
    command = [sys.executable, "-m", "hecompile.cli", "ckks", "serve", str(build / "worker"), "--listen", address]
    with running_server([*command, "--events", "json"]) as (process, told):
        assert told == address
        yield address
        process.terminate()
        assert process.wait(timeout=20) == 0


def test_logits_are_those_of_the_cleartext_polynomial_graph(checkpoint: Path, build: Path, worker: str) -> None:
    graph = ir.load(build / "worker" / CIRCUIT)
    with torch.no_grad():
        table = load_checkpoint(str(checkpoint)).model.get_input_embeddings()
        embeddings = table(torch.from_numpy(TOKENS))  # type: ignore[operator]
        expected = Interpreter(graph).run({EMBEDDINGS: embeddings})["logits"].numpy()
    with CkksSession(build / "client", worker) as session:
        found = session.logits(TOKENS)
        stats, key_bytes = session.stats, session.key_bytes
        answers = complete(session, ["ab", "z"], 1)
    assert found.shape == expected.shape == (3, 3, 259)
    assert np.abs(found - expected).max() < 1e-3 * (expected.max() - expected.min())
    assert stats.refreshes == len(session.plan.refreshes) > 0
    assert stats.worker_seconds["Mul"] > 0
    _, circuit, parameters = open_worker(build / "worker")
    predicted = predicted_traffic(circuit, parameters)
    assert stats.refreshed == predicted.refreshed < sum(int(np.prod(shape)) for shape in session.plan.refreshes.values())
    # Headers are not predicted: kinds and shapes, and where each logit is.
    assert 0 < stats.bytes_up - predicted.bytes_up(parameters) < 0.01 * stats.bytes_up
    assert 0 < stats.bytes_down - predicted.bytes_down(parameters) < 0.01 * stats.bytes_down
    assert 0 < key_bytes - parameters.evaluation_key_bytes < 0.01 * key_bytes
    assert len(answers) == 2


def test_what_the_worker_gets_holds_no_secret(build: Path) -> None:
    assert sorted(path.name for path in (build / "worker").iterdir()) == [CIRCUIT, PLAN]
    plan, circuit, parameters = open_worker(build / "worker")
    assert set(circuit.inputs) == {EMBEDDINGS} and parameters.fields() == plan.parameters


def test_a_circuit_that_is_not_the_plans_is_refused(build: Path, tmp_path: Path) -> None:
    for name in (PLAN, CIRCUIT):
        (tmp_path / name).write_bytes((build / "worker" / name).read_bytes())
    plan = json.loads((tmp_path / PLAN).read_text())
    plan["parameters"]["scale_bits"] = 29
    (tmp_path / PLAN).write_text(json.dumps(plan))
    with pytest.raises(InputError, match="not the circuit of"):
        open_worker(tmp_path)
    (tmp_path / PLAN).write_text("{}")
    with pytest.raises(InputError, match="not a plan of this version"):
        CkksPlan.read(tmp_path)
    with pytest.raises(InputError, match="nowhere does not exist"):
        CkksPlan.read(tmp_path / "nowhere")


def test_what_cannot_be_compiled_is_refused_with_the_reason(checkpoint: Path, tmp_path: Path) -> None:
    with pytest.raises(LegalityError, match=r"its attention \(softmax\), and .* Export it with --attention chebyshev, or"):
        export_polynomial(str(checkpoint), tmp_path / "exact", CkksOptions(3, attention="exact"))
    wrong = CkksOptions(3, attention="exact", norm="exact", activation="quantized")
    named = r"its attention \(softmax\), norm \(RMSNorm\), activation \(a table\), and"
    asked = "--attention chebyshev --norm polynomial --activation polynomial, or .*`hecompile convert`"
    with pytest.raises(LegalityError, match=f"{named} .*{asked}"):
        export_polynomial(str(checkpoint), tmp_path / "exact", wrong)
    with pytest.raises(LegalityError, match=r"its power attention divides exactly.*division goldschmidt"):
        export_polynomial(str(checkpoint), tmp_path / "power", CkksOptions(3, attention="power"))
    with pytest.raises(InputError, match="16 positions"):
        export_polynomial(str(checkpoint), tmp_path / "long", CkksOptions(17))
    with pytest.raises(InputError, match="no PEFT adapter"):
        export_polynomial(str(checkpoint), tmp_path / "adapter", OPTIONS, tmp_path)
    assert not any(tmp_path.iterdir())


def test_what_the_refusal_asks_for_is_accepted(checkpoint: Path) -> None:
    asked = CkksOptions(3, LEVELS, attention="chebyshev", norm="polynomial", activation="polynomial")
    plain = load_checkpoint(str(checkpoint))
    delattr(plain.model.config, CONFIG_KEY)
    with pytest.raises(LegalityError, match="--attention chebyshev --norm polynomial --activation polynomial"):
        lower_checkpoint(plain, CkksOptions(3, LEVELS))
    assert lower_checkpoint(plain, asked)[2] > 0


def test_a_disk_that_is_full_is_named_and_nothing_is_left(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def failing(*_: object) -> None:
        raise OSError("2072 requested and 1024 written")  # as `ndarray.tofile` says it

    monkeypatch.setattr(np, "save", failing)
    with pytest.raises(InputError, match=r"cannot write .*out: the disk may be full"):
        export_polynomial(str(checkpoint), tmp_path / "out", OPTIONS)
    assert not any(tmp_path.iterdir())


def test_an_earlier_build_is_replaced_or_left_as_it_was_and_its_neighbours_stay(
    build: Path, checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, neighbour = tmp_path / "out", tmp_path / "out.new"
    shutil.copytree(build, out)
    (out / "client" / "left-over").touch()
    neighbour.mkdir()
    (neighbour / "thesis.tex").write_text("the only copy")

    def refused(self: Path, target: Path) -> Path:
        if target == out and self.name.endswith(".partial"):
            raise PermissionError(13, "Permission denied")
        return rename(self, target)

    rename = Path.rename
    with monkeypatch.context() as context:
        context.setattr(Path, "rename", refused)
        with pytest.raises(InputError, match=r"cannot write .*out"):
            export_polynomial(str(checkpoint), out, OPTIONS)
    assert (out / "client" / "left-over").exists() and CkksPlan.read(out / "client") == CkksPlan.read(build / "client")
    export_polynomial(str(checkpoint), out, OPTIONS)
    assert not (out / "client" / "left-over").exists() and CkksPlan.read(out / "client") == CkksPlan.read(build / "client")
    assert (neighbour / "thesis.tex").read_text() == "the only copy"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "out.new"]


@pytest.mark.parametrize("stage", ["polynomial", "refreshed"])
def test_an_operator_that_is_no_polynomial_is_refused_by_name(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stage: str
) -> None:
    """As if the pass before the check had made it; both passes are registered, and neither is checked by itself."""
    changed = ExpandPolynomials if stage == "polynomial" else PlaceRefreshes
    call = changed.call

    def with_division(self: Any, model: ir.Model) -> ir.passes.PassResult:
        result = call(self, model)
        *_, last = result.model.graph
        node = ir.node("Div", [last.inputs[0], last.inputs[0]], metadata_props={ORIGIN: "model.norm"})
        node.outputs[0].name = "quotient"
        result.model.graph.insert_before(last, node)
        return result

    monkeypatch.setattr(changed, "call", with_division)
    with pytest.raises(LegalityError, match=f"stage '{stage}', model.norm: %quotient = Div.*onnx::Div is not legal here"):
        lower_checkpoint(load_checkpoint(str(checkpoint)), OPTIONS)


def test_an_adapter_is_merged_as_peft_does(checkpoint: Path, build: Path, tmp_path: Path) -> None:
    torch.manual_seed(5)
    config = peft.LoraConfig(r=2, lora_alpha=8, target_modules=["q_proj", "down_proj"], init_lora_weights=False)
    adapted: Any = peft.get_peft_model(load_checkpoint(str(checkpoint)).model, config)
    adapted.save_pretrained(tmp_path / "adapter")
    export_polynomial(str(checkpoint), tmp_path / "build", OPTIONS, tmp_path / "adapter")
    # Polynomials and text as before, for weights that were merged and saved before.
    merged = tmp_path / "merged"
    adapted.merge_and_unload().save_pretrained(merged)
    make_tokenizer().save_pretrained(merged)
    export_polynomial(str(merged), tmp_path / "expected", OPTIONS)
    embeddings = torch.from_numpy(np.load(build / "client" / TABLE)[TOKENS])
    found, expected, without = (
        Interpreter(ir.load(directory / "worker" / CIRCUIT)).run({EMBEDDINGS: embeddings})["logits"]
        for directory in (tmp_path / "build", tmp_path / "expected", build)
    )
    assert torch.allclose(found, expected, atol=1e-5)
    assert not torch.allclose(found, without, atol=1e-2)


def run_infer(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-W", "ignore", "-m", "hecompile.cli", *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=300)


def test_the_command_for_interactive_plans_knows_this_kind_too(build: Path, worker: str) -> None:
    prompts = tokens_of(build)
    plan = str(build / "client")
    own = run_infer("ckks", "infer", plan, "--worker", worker, *prompts)
    both = run_infer("infer", plan, "--worker", worker, "--max-new-tokens", "1", *prompts)
    assert both.returncode == 0, both.stderr
    assert both.stdout == own.stdout and both.stdout.count("\n") == len(prompts)
    for extra in (["--adapter", "somewhere"], ["--out", "a.jsonl", "--temperature", "1"], ["--authority", "ca.pem"]):
        refused = run_infer("infer", plan, "--worker", worker, *extra, "a")
        message = " ".join(refused.stderr.split())
        assert refused.returncode == 2 and f"leave out {', '.join(extra[::2])};" in message, message


def tokens_of(build: Path) -> list[str]:
    """Return two prompts short enough for the plan of three tokens."""
    tokenizer = make_tokenizer()
    prompts = ["a", "b"]
    assert all(0 < len(tokenizer(prompt)["input_ids"]) <= 3 for prompt in prompts)
    return prompts


def test_what_cannot_be_sent_is_refused(build: Path, worker: str) -> None:
    with CkksSession(build / "client", worker) as session:
        with pytest.raises(InputError, match=r"takes tokens \[B, 3\]"):
            session.logits(TOKENS[:, :2])
        with pytest.raises(InputError, match="outside the vocabulary"):
            session.logits(TOKENS + 259)
        with pytest.raises(InputError, match="4097 sequences are more than the 4096 slots"):
            session.logits(np.ones((4097, 3), dtype=np.int64))
        with pytest.raises(InputError, match=r"prompt 2 has 7 tokens.* more than the plan's 3") as caught:
            complete(session, ["a", "secret"], 1)
        assert "secr" not in str(caught.value)
    with pytest.raises(WorkerUnavailableError, match="no worker answers"):
        CkksSession(build / "client", worker + "x")


@contextmanager
def playing(tmp_path: Path, script: Callable[[socket.socket], None]) -> Iterator[str]:
    """Serve as a worker that takes the keys and then does as `script` says."""
    path = str(tmp_path / "s")
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(path)
        listener.listen()

        def serve() -> None:
            connection, _ = listener.accept()
            with connection:
                receive(connection, 1 << 30)
                send(connection, "ready")
                receive(connection, 1 << 30)
                script(connection)

        thread = threading.Thread(target=serve)
        thread.start()
        yield f"unix://{path}"
        thread.join(timeout=30)
        assert not thread.is_alive()


def noise(session: CkksSession, count: int) -> np.ndarray:
    moduli = np.array(session.parameters.moduli[:2])
    shape = (count, 2, 2, session.parameters.ring_dim)
    return np.random.default_rng(0).integers(0, moduli[:, None], shape).astype(np.uint32)


def test_a_worker_sees_no_difference_in_what_it_makes_the_client_decrypt(build: Path, tmp_path: Path) -> None:
    """Words of its own making decrypt to numbers beyond every bound: the client goes on, and says so at the end."""
    plan = CkksPlan.read(build / "client")
    answered: list[tuple[int, ...]] = []

    def script(connection: socket.socket) -> None:
        for value in plan.refreshes:
            send(connection, "refresh", noise(session, 1), value=value, level=2)
            answered.append(receive(connection, 1 << 30)[1].shape)
        send(connection, "result", noise(session, 1), level=0, index=[0] * (3 * 259), seconds={})

    with playing(tmp_path, script) as address, CkksSession(build / "client", address) as session:
        with pytest.raises(HecompileError, match="the range of a ciphertext"):
            session.logits(TOKENS)
        top = (1, 2, session.parameters.primes(LEVELS), session.parameters.ring_dim)
    assert answered == [top] * len(plan.refreshes)


@pytest.mark.parametrize("what", ["unknown", "twice", "too many", "left out", "index", "level", "other"])
def test_a_worker_that_breaks_the_protocol_is_refused(build: Path, tmp_path: Path, what: str) -> None:
    plan = CkksPlan.read(build / "client")
    (first, shape), *_ = plan.refreshes.items()
    places = list(range(3 * 259))

    def script(connection: socket.socket) -> None:
        if what == "unknown":
            send(connection, "refresh", noise(session, 1), value="logits", level=1)
        elif what == "twice":
            send(connection, "refresh", noise(session, 1), value=first, level=1)
            receive(connection, 1 << 30)
            send(connection, "refresh", noise(session, 1), value=first, level=1)
        elif what == "too many":
            send(connection, "refresh", noise(session, int(np.prod(shape)) + 1), value=first, level=1)
        elif what == "level":
            send(connection, "refresh", noise(session, 1), value=first, level=LEVELS + 1)
        elif what == "other":
            send(connection, "ready")
        else:
            for value in plan.refreshes if what == "index" else ():
                send(connection, "refresh", noise(session, 1), value=value, level=1)
                receive(connection, 1 << 30)
            send(connection, "result", noise(session, 1), level=0, index=places, seconds={})

    with (
        playing(tmp_path, script) as address,
        CkksSession(build / "client", address) as session,
        pytest.raises(WorkerError),
    ):
        session.logits(TOKENS)


def test_a_worker_refuses_a_client_of_another_plan(build: Path, worker: str) -> None:
    session = CkksSession(build / "client", worker)
    session.close()
    with socket.socket(socket.AF_UNIX) as connection:
        connection.connect(worker.removeprefix("unix://"))
        shape = (len(session.parameters.moduli) - 1, 2, len(session.parameters.moduli), session.parameters.ring_dim)
        send(connection, "open", np.zeros(shape, dtype=np.uint32), protocol=1, plan_id="another")
        with pytest.raises(WorkerError, match="of another plan"):
            receive(connection, 1 << 20)
