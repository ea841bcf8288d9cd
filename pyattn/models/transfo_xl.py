"""Transformer-XL as transformers wrote it to folders until its version 5: TransfoXLLMHeadModel's fields and names."""

from __future__ import annotations

import re
from typing import Any

from pyattn.models.pretrained import Fields

# Of the files' tensors: the periods of the sinusoids, and of the head what is the embedding's, too.
IGNORED = re.compile(r"^transformer\.pos_emb\.inv_freq$|^crit\.out_layers\.\d+\.weight$|^crit\.out_projs\.[1-9]")

# Their names, and ours.
_WHOLE = {
    r"^transformer\.word_emb\.emb_layers\.0\.": "embedding.",
    r"^crit\.out_layers\.0\.bias$": "bias",
}
_ADAPTIVE = {
    r"^transformer\.word_emb\.emb_layers\.(\d+)\.weight$": r"adaptive.tables.\1",
    r"^transformer\.word_emb\.emb_projs\.": "adaptive.projections.",
    r"^crit\.out_projs\.": "adaptive.out_projections.",
    r"^crit\.out_layers\.(\d+)\.bias$": r"adaptive.biases.\1",
    r"^crit\.cluster_": "adaptive.cluster_",
}
_LAYERS = {
    r"^transformer\.(layers\.\d+\.)": r"\1",
    r"dec_attn\.(qkv|r)_net\.": r"attn.\1.",
    r"dec_attn\.o_net\.": "attn.out.",
    r"dec_attn\.layer_norm\.": "norm_1.",
    r"dec_attn\.r_w_bias$": "attn.biases.u",
    r"dec_attn\.r_r_bias$": "attn.biases.w",
    r"pos_ff\.CoreNet\.0\.": "mlp.up.",
    r"pos_ff\.CoreNet\.3\.": "mlp.down.",
    r"pos_ff\.layer_norm\.": "norm_2.",
}


def options(fields: Fields) -> dict[str, Any]:
    """The arguments of a `TransformerXLConfig`; raises PretrainedError where a config.json says something else."""
    width, cutoffs = fields.integer("d_model"), fields.typed("cutoffs", tuple[int, ...])
    fields.expect(architectures=["TransfoXLLMHeadModel"], d_embed=width, **({} if cutoffs else {"div_val": 1}))
    fields.expect(attn_type=0, untie_r=True, layer_norm_epsilon=1e-5, tie_word_embeddings=True)
    tied, untied = ([False] + [tie] * len(cutoffs) for tie in (True, False))
    fields.expect(tie_projs=(tied, untied))
    clamp = fields.integer("clamp_len")
    return {
        "vocab": fields.integer("vocab_size"),
        "layers": fields.integer("n_layer"),
        "heads": fields.integer("n_head"),
        "width": width,
        "head_size": fields.integer("d_head"),
        "hidden": fields.integer("d_inner"),
        "memory": fields.integer("mem_len"),
        "clamp": clamp if clamp > 0 else None,
        "same_length": fields.typed("same_length", bool),
        "norm": "pre" if fields.typed("pre_lnorm", bool) else "post",
        "cutoffs": cutoffs,
        "div_val": fields.integer("div_val"),
        "tie_projections": fields.get("tie_projs", tied) == tied,
        "dropout": fields.typed("dropout", float),
        "attention_dropout": fields.typed("dropatt", float),
        "end": fields.typed("eos_token_id", int | None),
    }


def our_name(name: str, *, adaptive: bool, tie_projections: bool) -> str:
    """Of a tensor that they call `name`; one with another name keeps it."""
    if adaptive and tie_projections and re.match(r"crit\.out_projs\.[1-9]", name):
        return name  # a copy of the embedding's, which is ignored
    for theirs, ours in (_LAYERS | (_ADAPTIVE if adaptive else _WHOLE)).items():
        name = re.sub(theirs, ours, name)
    return name
