"""How SD3, FLUX.1 and Wan name their layers in the authors' own code, as tables; diffusers' names stand on the right.

One layer of theirs may be several here: a fused projection is cut by rows, in the order given. `SWAP` marks a last
modulation, whose two halves (shift and scale) diffusers stores in the other order. All follows from the names and
shapes of the model's own layers, so a table row without a counterpart in the model does nothing.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

Shape = tuple[int, ...]
SWAP, SWAP_LAST = "<swapped>", "<swapped if it has two parts, not six>"
Table = tuple[tuple[str, tuple[str, ...]], ...]

QKV, ADDED = ("attn.to_q", "attn.to_k", "attn.to_v"), ("attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj")
FLUX_DOUBLE: Table = (
    ("img_mod.lin", ("norm1.linear",)),
    ("txt_mod.lin", ("norm1_context.linear",)),
    ("img_attn.qkv", QKV),
    ("txt_attn.qkv", ADDED),
    ("img_attn.proj", ("attn.to_out.0",)),
    ("txt_attn.proj", ("attn.to_add_out",)),
    ("img_mlp.0", ("ff.net.0.proj",)),
    ("img_mlp.2", ("ff.net.2",)),
    ("txt_mlp.0", ("ff_context.net.0.proj",)),
    ("txt_mlp.2", ("ff_context.net.2",)),
    ("processor.qkv_lora1", QKV),  # XLabs
    ("processor.qkv_lora2", ADDED),
    ("processor.proj_lora1", ("attn.to_out.0",)),
    ("processor.proj_lora2", ("attn.to_add_out",)),
)
FLUX_SINGLE: Table = (
    ("modulation.lin", ("norm.linear",)),
    ("linear1", (*QKV, "proj_mlp")),
    ("linear2", ("proj_out",)),
    ("processor.qkv", QKV),  # XLabs: `qkv_lora.down.weight`, whose `_lora` belongs to the ending
    ("processor.proj", ("proj_out",)),
)
FLUX_REST: Table = (
    ("img_in", ("x_embedder",)),
    ("txt_in", ("context_embedder",)),
    ("time_in.in_layer", ("time_text_embed.timestep_embedder.linear_1",)),
    ("time_in.out_layer", ("time_text_embed.timestep_embedder.linear_2",)),
    ("vector_in.in_layer", ("time_text_embed.text_embedder.linear_1",)),
    ("vector_in.out_layer", ("time_text_embed.text_embedder.linear_2",)),
    ("guidance_in.in_layer", ("time_text_embed.guidance_embedder.linear_1",)),
    ("guidance_in.out_layer", ("time_text_embed.guidance_embedder.linear_2",)),
    ("final_layer.linear", ("proj_out",)),
    ("final_layer.adaLN_modulation.1", ("norm_out.linear", SWAP)),
)
SD3_BLOCK: Table = (
    ("x_block.adaLN_modulation.1", ("norm1.linear",)),
    ("x_block.attn.qkv", QKV),
    ("x_block.attn2.qkv", ("attn2.to_q", "attn2.to_k", "attn2.to_v")),
    ("x_block.attn.proj", ("attn.to_out.0",)),
    ("x_block.attn2.proj", ("attn2.to_out.0",)),
    ("x_block.mlp.fc1", ("ff.net.0.proj",)),
    ("x_block.mlp.fc2", ("ff.net.2",)),
    ("context_block.adaLN_modulation.1", ("norm1_context.linear", SWAP_LAST)),
    ("context_block.attn.qkv", ADDED),
    ("context_block.attn.proj", ("attn.to_add_out",)),
    ("context_block.mlp.fc1", ("ff_context.net.0.proj",)),
    ("context_block.mlp.fc2", ("ff_context.net.2",)),
)
SD3_REST: Table = (
    ("x_embedder.proj", ("pos_embed.proj",)),
    ("context_embedder", ("context_embedder",)),
    ("t_embedder.mlp.0", ("time_text_embed.timestep_embedder.linear_1",)),
    ("t_embedder.mlp.2", ("time_text_embed.timestep_embedder.linear_2",)),
    ("y_embedder.mlp.0", ("time_text_embed.text_embedder.linear_1",)),
    ("y_embedder.mlp.2", ("time_text_embed.text_embedder.linear_2",)),
    ("final_layer.linear", ("proj_out",)),
    ("final_layer.adaLN_modulation.1", ("norm_out.linear", SWAP)),
)
WAN_BLOCK: Table = (
    *((f"{old}.{part}", (f"{new}.{ours}",))
      for old, new in (("self_attn", "attn1"), ("cross_attn", "attn2"))
      for part, ours in (("q", "to_q"), ("k", "to_k"), ("v", "to_v"), ("o", "to_out.0"),
                         ("k_img", "add_k_proj"), ("v_img", "add_v_proj"))),
    ("ffn.0", ("ffn.net.0.proj",)),
    ("ffn.2", ("ffn.net.2",)),
    ("norm3", ("norm2",)),
)  # fmt: skip
WAN_REST: Table = (
    ("text_embedding.0", ("condition_embedder.text_embedder.linear_1",)),
    ("text_embedding.2", ("condition_embedder.text_embedder.linear_2",)),
    ("time_embedding.0", ("condition_embedder.time_embedder.linear_1",)),
    ("time_embedding.2", ("condition_embedder.time_embedder.linear_2",)),
    ("time_projection.1", ("condition_embedder.time_proj",)),
    ("img_emb.proj.0", ("condition_embedder.image_embedder.norm1",)),
    ("img_emb.proj.1", ("condition_embedder.image_embedder.ff.net.0.proj",)),
    ("img_emb.proj.3", ("condition_embedder.image_embedder.ff.net.2",)),
    ("img_emb.proj.4", ("condition_embedder.image_embedder.norm2",)),
    ("head.head", ("proj_out",)),
)
# family -> (their prefix of a block, ours) with its table, and the rest
FAMILIES: Mapping[str, tuple[tuple[tuple[str, str, Table], ...], Table]] = {
    "flux1": (
        (
            ("double_blocks", "transformer_blocks", FLUX_DOUBLE),
            ("single_blocks", "single_transformer_blocks", FLUX_SINGLE),
        ),
        FLUX_REST,
    ),
    "sd3": ((("joint_blocks", "transformer_blocks", SD3_BLOCK),), SD3_REST),
    "wan": ((("blocks", "blocks", WAN_BLOCK),), WAN_REST),
}


@dataclass(frozen=True)
class Piece:
    """One layer of the model as a part of a file's layer.

    Args:
        path: Canonical path.
        rows: Spans of the file's outputs that are this layer's, in its order; empty for all as they are.
        whole: Weight shape of the file's layer.
    """

    path: str
    rows: tuple[tuple[int, int], ...]
    whole: Shape


def spellings(family: str, shapes: Mapping[str, Shape]) -> Iterator[tuple[str, tuple[Piece, ...]]]:
    """Give the authors' names, with the layers each stands for.

    Args:
        family: Key of FAMILIES here; others give nothing.
        shapes: Path inside the transformer to weight shape.
    """
    blocks, rest = FAMILIES.get(family, ((), ()))
    for theirs, ours in rest:
        yield from _row(theirs, ours, "", shapes)
    for theirs, ours, table in blocks:
        numbers = {path.split(".")[1] for path in shapes if path.startswith(f"{ours}.")}
        for number in sorted(numbers, key=int):
            for old, new in table:
                yield from _row(f"{theirs}.{number}.{old}", new, f"{ours}.{number}.", shapes)


def _row(
    theirs: str, ours: Sequence[str], prefix: str, shapes: Mapping[str, Shape]
) -> Iterator[tuple[str, tuple[Piece, ...]]]:
    paths = [prefix + name for name in ours if name not in (SWAP, SWAP_LAST)]
    if not all(path in shapes for path in paths):
        return
    outs = [shapes[path][0] for path in paths]
    swapped = SWAP in ours or (SWAP_LAST in ours and outs[0] == 2 * shapes[paths[0]][1])
    whole = (sum(outs), *shapes[paths[0]][1:])
    if len(paths) == 1:
        half = outs[0] // 2
        yield theirs, (Piece(f"transformer.{paths[0]}", ((half, outs[0]), (0, half)) if swapped else (), whole),)
        return
    starts = [sum(outs[:i]) for i in range(len(outs))]
    yield (
        theirs,
        tuple(
            Piece(f"transformer.{path}", ((start, start + out),), whole)
            for path, start, out in zip(paths, starts, outs, strict=True)
        ),
    )
