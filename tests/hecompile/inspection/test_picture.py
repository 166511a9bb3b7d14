"""Draw plans: layers that are alike once, every crossing with its bytes, nothing on top of anything else."""

from __future__ import annotations

import itertools
from dataclasses import replace
from pathlib import Path
from xml.etree import ElementTree

import pytest

from hecompile.bundles.client import ClientBundle
from hecompile.errors import InputError
from hecompile.inspection.ckks import open_bundle
from hecompile.inspection.linear import products_of
from hecompile.inspection.picture.ckks import ckks_diagram, draw_ckks
from hecompile.inspection.picture.folding import Diagram, byte_span, fold
from hecompile.inspection.picture.layout import Rectangle, place
from hecompile.inspection.picture.linear import draw_plan, plan_diagram
from hecompile.inspection.picture.operators import Operator, Quantity
from tests.conftest import ROOT

QKV = "self_attn.q_proj-k_proj-v_proj"
OLD_CKKS = ROOT / "tests" / "e2e" / "old_files" / "ckks"


@pytest.fixture(scope="module")
def bundle(build: Path) -> ClientBundle:
    return ClientBundle.open(build / "client")


def decoder(masks: list[str], bits: list[int]) -> list[Operator]:
    """Return a norm, a linear of the worker, an attention and a residual sum per layer, each with a mask of its own."""
    names = ["input_ids", *dict.fromkeys(masks)]
    operators = [Operator(name, "", name, False, ()) for name in names]
    operators.append(Operator("embedding", "model.embed_tokens", "Gather", False, ("input_ids",)))
    before = "embedding"
    for layer, (mask, weight_bits) in enumerate(zip(masks, bits, strict=True)):
        module = f"model.layers.{layer}"
        up = (Quantity("forward {} →", (100 + layer,), True), Quantity("← backward {}", (50,) if layer else (), True))
        facts = (Quantity("{} bits", (weight_bits,)),)
        operators += [
            Operator(f"norm{layer}", f"{module}.norm", "RMSNorm", False, (before,)),
            Operator(
                f"q{layer}",
                f"{module}.q",
                "Linear",
                True,
                (f"norm{layer}",),
                facts,
                up,
            ),
            Operator(f"rotary{layer}", f"{module}.attn", "Rotary", False, (f"q{layer}",)),
            Operator(f"softmax{layer}", f"{module}.attn", "Softmax", False, (f"rotary{layer}", mask)),
            Operator(f"sum{layer}", module, "Add", False, (before, f"softmax{layer}")),
        ]
        before = f"sum{layer}"
    return [*operators, Operator("logits", "lm_head", "Linear", False, (before,))]


def test_layers_that_are_alike_are_drawn_once_with_their_ranges() -> None:
    diagram = fold(decoder(["mask"] * 30, [8, 10] * 15))
    assert diagram.frames == ("layers 0–29 (× 30), each on the result of the one before",)
    assert [name for name, box in diagram.boxes.items() if box.frame == 0] == ["norm0", "q0", "rotary0", "sum0"]
    assert diagram.boxes["q0"].lines == ("Linear", "8–10 bits") and diagram.boxes["q0"].worker
    assert diagram.boxes["q0"].arriving == ("forward 100–129 B →", "← backward 50 B (29 of 30 layers)")
    assert diagram.boxes["rotary0"].lines == ("Rotary, Softmax",)  # of one module
    assert set(diagram.edges) == {
        ("input_ids", "embedding"), ("embedding", "norm0"), ("embedding", "sum0"), ("norm0", "q0"), ("q0", "rotary0"),
        ("mask", "rotary0"), ("rotary0", "sum0"), ("sum0", "logits"),
    }  # fmt: skip


def test_layers_that_differ_have_frames_of_their_own() -> None:
    """Tells layers apart by what they read, and by operators that one of them lacks."""
    diagram = fold(decoder(["local", "global"] * 3, [8] * 6))
    assert diagram.frames == (
        "layers 0, 2, 4 (× 3 of 6), in the order of their numbers",
        "layers 1, 3, 5 (× 3 of 6), in the order of their numbers",
    )
    assert {("local", "rotary0"), ("global", "rotary1"), ("sum0", "norm1"), ("sum1", "logits")} <= set(diagram.edges)
    assert ("global", "rotary0") not in diagram.edges and ("sum1", "norm0") not in diagram.edges
    operators = decoder(["mask"] * 4, [8] * 4)
    changed = [replace(one, label="LayerNorm") if one.name == "norm3" else one for one in operators]
    diagram = fold(changed)
    assert diagram.frames == ("layers 0–2 (× 3 of 4), in the order of their numbers", "layer 3 (1 of 4)")
    assert ("sum3", "logits") in diagram.edges and ("sum0", "logits") not in diagram.edges


def test_what_a_module_does_before_and_after_another_one_is_two_boxes() -> None:
    chain = [
        Operator("a", "", "a", False, ()),
        Operator("first", "m.attn", "Mul", False, ("a",)),
        Operator("inner", "m.attn.norm", "RMSNorm", False, ("first",)),
        Operator("last", "m.attn", "Add", False, ("first", "inner")),
    ]
    diagram = fold(chain)
    assert list(diagram.boxes) == ["a", "first", "inner", "last"]
    assert set(diagram.edges) == {("a", "first"), ("first", "inner"), ("first", "last"), ("inner", "last")}


def overlap(one: Rectangle, other: Rectangle) -> bool:
    return one.left < other.right and other.left < one.right and one.bottom < other.top and other.bottom < one.top


def check_placed(diagram: Diagram) -> None:
    """Nothing overlaps, edges lead downwards, bends miss every box, client and worker stand apart."""
    layout = place(diagram)
    assert not any(overlap(*pair) for pair in itertools.combinations(layout.boxes.values(), 2))
    for (source, target), course in layout.courses.items():
        heights = [layout.boxes[source].bottom, *(y for _, y in course), layout.boxes[target].top]
        assert heights == pytest.approx(sorted(heights, reverse=True))
        for (x, top), (below, bottom) in zip(course[1:-1:2], course[2:-1:2], strict=True):  # across a row
            assert x == below
            straight = Rectangle(x, (top + bottom) / 2, 0.01, top - bottom)
            assert not any(overlap(straight, box) for box in layout.boxes.values())
        for (_, top), (_, bottom) in zip(course[::2], course[1::2], strict=True):  # between two rows
            assert not any(box.top > bottom + 1e-6 and box.bottom < top - 1e-6 for box in layout.boxes.values())
    left, right = layout.gap
    for name, box in diagram.boxes.items():
        where = layout.boxes[name]
        assert where.left >= right - 1e-6 if box.worker else where.right <= left + 1e-6
    for frame in range(len(diagram.frames)):
        inside = [layout.boxes[name] for name, box in diagram.boxes.items() if box.frame == frame]
        top, bottom = max(box.top for box in inside), min(box.bottom for box in inside)
        outside = [layout.boxes[name] for name, box in diagram.boxes.items() if box.frame != frame]
        assert all(box.bottom > top or box.top < bottom for box in outside)


def test_nothing_stands_on_anything_else(bundle: ClientBundle) -> None:
    check_placed(plan_diagram(bundle.graph(), products_of(bundle)))
    check_placed(fold(decoder(["local", "global"] * 3, [8] * 6)))
    old = open_bundle(OLD_CKKS)
    assert old.model is not None
    check_placed(ckks_diagram(old, old.model))


def test_a_build_is_one_layer_with_what_crosses(bundle: ClientBundle) -> None:
    diagram = plan_diagram(bundle.graph(), products_of(bundle))
    assert diagram.frames == ("layers 0–1 (× 2), each on the result of the one before",)
    worker = {box.title: box for box in diagram.boxes.values() if box.worker}
    assert list(worker) == [QKV, "self_attn.o_proj", "mlp.gate_proj-up_proj", "mlp.down_proj"]
    assert worker[QKV].lines == ("Linear", "32 → 64", "weights of 10 bits")
    forward, backward = (bundle.circuits[f"model.layers.1.{QKV}.{direction}"] for direction in ("forward", "backward"))
    up, down = (f"{forward.upload_bits * 4} B", f"{forward.reply_bits * 8} B")
    back_up, back_down = (f"{backward.upload_bits * 8} B", f"{backward.reply_bits * 4} B")
    assert worker[QKV].arriving == (f"forward {up} →", f"← backward {back_down} (1 of 2 layers)")
    assert worker[QKV].leaving == (f"← forward {down}", f"backward {back_up} → (1 of 2 layers)")
    assert len(worker["mlp.down_proj"].arriving) == 2
    crossing = [
        (source, target)
        for source, target in diagram.edges
        if diagram.boxes[source].worker != diagram.boxes[target].worker
    ]
    assert all(diagram.boxes[source].crosses or diagram.boxes[target].crosses for source, target in crossing)


def test_a_ckks_plan_shows_its_refreshes() -> None:
    old = open_bundle(OLD_CKKS)
    assert old.model is not None
    diagram = ckks_diagram(old, old.model)
    refreshes = [box for box in diagram.boxes.values() if "decrypt, encrypt" in box.lines]
    assert len(refreshes) == len(old.traffic.refreshes) == 11 and not any(box.worker for box in refreshes)
    stale, fresh = (old.parameters.ciphertext_bytes(level) for level in (0, old.parameters.levels))
    assert refreshes[0].arriving == (f"← {byte_span([2 * stale])} to refresh",)
    assert refreshes[0].leaving == (f"{byte_span([2 * fresh])} fresh →",)
    assert diagram.boxes["inputs_embeds"].leaving == (f"{byte_span([old.traffic.inputs * fresh])} →",)
    assert all(box.worker for box in diagram.boxes.values() if "Linear" in box.lines)


def test_bytes_of_a_range_have_one_unit() -> None:
    assert byte_span([1728, 2304]) == "1728–2304 B" and byte_span([9000, 12288]) == "9–12.29 kB"
    assert byte_span([2_500_000]) == "2.5 MB" and byte_span([4e9, 1e6]) == "0.001–4 GB"


def test_an_svg_has_colours_names_bytes_and_a_legend(bundle: ClientBundle, tmp_path: Path) -> None:
    path = tmp_path / "plan.svg"
    draw_plan(bundle, products_of(bundle), path)
    root = ElementTree.parse(path).getroot()
    texts = {"".join(element.itertext()).strip() for element in root.iter("{http://www.w3.org/2000/svg}text")}
    qkv_up = bundle.circuits[f"model.layers.0.{QKV}.forward"].bytes_up(1)
    wanted = {QKV, f"forward {qkv_up} B →", "computed by the client", "worker: sees ciphertexts only", "RMSNorm"}
    assert wanted <= texts
    text = path.read_text()
    assert "#9ecae1" in text and "#fdae6b" in text
    draw_plan(bundle, products_of(bundle), tmp_path / "again.svg")
    assert (tmp_path / "again.svg").read_text() == text


def test_png(tmp_path: Path) -> None:
    draw_ckks(open_bundle(OLD_CKKS), tmp_path / "plan.png")
    assert (tmp_path / "plan.png").read_bytes().startswith(b"\x89PNG\r\n\x1a\n")


@pytest.mark.parametrize("name", ["plan.pdf", "plan", "plan.svg.txt"])
def test_other_file_types_are_refused(bundle: ClientBundle, tmp_path: Path, name: str) -> None:
    with pytest.raises(InputError, match=r"give a file that ends in \.svg or \.png"):
        draw_plan(bundle, products_of(bundle), tmp_path / name)
    assert list(tmp_path.iterdir()) == []


def test_what_cannot_be_drawn_is_refused(bundle: ClientBundle, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"cannot write .*nowhere"):
        draw_plan(bundle, products_of(bundle), tmp_path / "nowhere" / "plan.svg")
    with pytest.raises(InputError, match="no circuit to draw"):
        draw_ckks(open_bundle(OLD_CKKS / "client"), tmp_path / "plan.svg")
    assert list(tmp_path.iterdir()) == []
