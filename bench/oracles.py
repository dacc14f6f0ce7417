"""What other projects compute, as test vectors: python bench/oracles.py FILE PEER [CHECKOUT COMMIT]

PEER: one of PEERS in bench/oracle_peers.py, or `table`, which prints FILE as docs/recipes.md has it. `torchao` is the
installed package; of the others, CHECKOUT is a checkout of their repository at COMMIT; quartet wants TRITON_INTERPRET=1
and triton. What FILE held of that peer is replaced, the rest stays. tests/low_precision/test_oracles.py compares ours
with the numbers in tests/low_precision/oracles.json, without any peer.

Each peer rounds the operands of linear layers (tests/oracle_inputs.py). Kept of an operand are the first digits of the
SHA-256 of its codes (what the element holds) and scales, as little-endian float32 numbers; of the products a few
numbers. Codes and scales and not the numbers themselves, because peers decode them in different ways: torchao's float8
divides by the scale, as we do, others multiply by its rounded reciprocal.
"""

from __future__ import annotations

import argparse
import importlib
import json
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests"), str(ROOT / "bench")]

from oracle_inputs import HARD, NAMES, cut, digest, layer, layer_digest, sampled  # noqa: E402
from oracle_peers import NVFP4, PEERS, RAGGED, Recipe, constants_of_the_transform  # noqa: E402
from oracle_rounding import as_kept, differing, told_operand  # noqa: E402


def vectors(name: str, recipe: Recipe) -> dict[str, Any]:
    """The digests of each operand, and some numbers of each product, of all layers in order.

    differ: of how many of the numbers and scales of a layer's operands the plain telling in tests/oracle_rounding.py
    makes something else than the peer.
    """
    operands: dict[str, Any] = {}
    products: dict[str, list[str]] = {}
    differ: dict[str, list[int]] = {}
    for of_layer in NAMES:
        arrays = cut(layer(of_layer)) if name == RAGGED else layer(of_layer)
        read, made = recipe({tensor: torch.from_numpy(array) for tensor, array in arrays.items()})
        counts = np.zeros(2, np.int64)
        for site, (text, codes, scales) in read.items():
            kept = operands.setdefault(site, {"rule": text, "digests": []})
            assert kept["rule"] == text
            rule, _, kind = text.partition(" ")
            kept["digests"].append(digest(codes.numpy(), scales.numpy(), rule.split("@")[1]))
            ours = as_kept(told_operand(arrays, site, rule, is_nvfp4=name == NVFP4), kind)
            counts += differing(ours, (codes.numpy(), scales.numpy()), rule.split("@")[1])
        if counts.any():
            differ[of_layer] = counts.tolist()
        for product, tensor in made.items():
            products.setdefault(product, []).append(sampled(tensor.float().numpy()))
    return {"operands": operands, **({"products": products} if products else {}), "differ": differ}


WHAT = {  # peer and recipe -> what of ours is beside it
    ("torchao", "float8 tensorwise"): "recipe `ao-tensorwise`",
    ("torchao", "float8 rowwise"): "recipe `ao-rowwise`",
    ("torchao", "float8 rowwise_with_gw_hp"): "recipe `ao-rowwise-gw-hp`",
    ("torchao", "blocks of 128"): "recipe `deepseek`",
    ("torchao", "NVFP4Tensor"): "`nvfp4`",
    ("torchao", "int8"): "recipe `int8`",
    ("torchao-checkout", NVFP4): "recipe `nvfp4`, to nearest",
    ("transformer-engine", "current scaling"): "recipe `te-current`",
    ("transformer-engine", "blocks of 128, float32 scales"): "recipe `deepseek`",
    ("transformer-engine", "blocks of 128"): "`float8_e4m3fn@128@pow2`, weights `@128x128@pow2`",
    ("transformer-engine", RAGGED): "the same",
    ("transformer-engine", "MXFP8"): "recipe `mxfp8`",
    ("transformer-engine", "MXFP8, 32x32"): "`float8_e4m3fn@32x32@e8m0_rceil`",
    ("transformer-engine", NVFP4): "recipe `nvfp4`, to nearest",
    ("quartet", "forward, without the transform"): "`float4_e2m1fn@32@quest`",
    ("quartet", "backward, without the transform"): "`float4_e2m1fn@32@headroom`",
    ("tseng", "3/4, to nearest, without the transform"): "`float4_e2m1fn@32@headroom`",
}
PROJECTS = {
    "torchao-checkout": "torchao",
    "transformer-engine": "TransformerEngine",
    "quartet": "Quartet",
    "tseng": "mxfp4-llm",
}


def table(everything: dict[str, Any]) -> list[str]:
    """The lines of docs/recipes.md: of each peer's recipe, how many layers have its bits, and how much else differs."""
    rows: dict[tuple[str, str, str], Counter[str]] = {}
    for peer, content in everything.items():
        for name, row in content["recipes"].items() if peer != "layers" else ():
            kind, _, rest = name.partition(" ")
            mode = rest.partition(" ")[2]
            ours = WHAT.get((peer, name), f"`ELEMENT@32@e8m0{'' if mode == 'floor' else '_' + mode}`, five elements")
            project = f"{PROJECTS.get(peer, peer)} {content['version']}"
            counts = rows.setdefault((ours, project, f"MX, {mode}" if kind == "MX" else name), Counter())
            for of_layer in NAMES:
                codes, scales = row["differ"].get(of_layer, (0, 0))
                layers = "hard" if of_layer in HARD else "random"
                counts.update({layers: 1, f"{layers} equal": not codes + scales, "codes": codes, "scales": scales})
    head = "| ours | beside | its recipe | random layers equal | hard layers equal | numbers that differ | scales |"
    lines = [head, f"|{'---|' * 7}"]
    for key, n in rows.items():
        layers = (f"{n[f'{kind} equal']} of {n[kind]}" for kind in ("random", "hard"))
        lines.append(f"| {' | '.join((*key, *layers))} | {n['codes']:,} | {n['scales']:,} |")
    return lines


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.partition(":")[0])
    parser.add_argument("file", type=Path)
    parser.add_argument("peer", choices=[*PEERS, "table"])
    parser.add_argument("checkout", nargs="?", default="")
    parser.add_argument("commit", nargs="?", default="")
    arguments = parser.parse_args()
    if arguments.peer == "table":
        print("\n".join(table(json.loads(arguments.file.read_text()))))
        sys.exit()
    if arguments.peer == "torchao-checkout":
        sys.path.insert(0, arguments.checkout)
    version = arguments.commit or importlib.import_module(arguments.peer).__version__
    torch.set_num_threads(1)
    torch.backends.mkldnn.enabled = False  # its products of bfloat16 flush subnormal numbers on some machines
    made = {name: vectors(name, recipe) for name, recipe in PEERS[arguments.peer](arguments.checkout)}
    everything = json.loads(arguments.file.read_text()) if arguments.file.exists() else {}
    everything["layers"] = {name: layer_digest(name) for name in NAMES}
    everything[arguments.peer] = {"version": version, "torch": torch.__version__, "recipes": made}
    if arguments.peer == "transformer-engine":
        everything[arguments.peer]["transform"] = constants_of_the_transform()
    arguments.file.write_text(json.dumps(everything, indent=0) + "\n")
