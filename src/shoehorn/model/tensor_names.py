"""Patterns of tensor names in checkpoints."""

from __future__ import annotations

import re

_TOP = r"(?:model\.|language_model\.|transformer\.)*"
IN_LAYER = re.compile(_TOP + r"(?:layers|h)\.(\d+)\.(.+)")
EMBEDDING = re.compile(_TOP + r"(?:embed_tokens|wte|tok_embeddings)\.\w+")
EMBEDDING_PACKED = re.compile(EMBEDDING.pattern.replace(r"\w+", "weight_packed"))
LM_HEAD = re.compile(r"(?:language_model\.)?lm_head\.\w+")
BNB_STATE = re.compile(r".*\.weight\.(absmax|nested_absmax|quant_map|nested_quant_map|quant_state\..*)|.*\.SCB")
PACKED = re.compile(r".*\.(qweight|qzeros|scales|g_idx|weight_g_idx|weight_packed|weight_shape|weight_scale(_inv)?|"
                     r"weight_zero_point|input_scale)")
COLUMNS = r"(?:o_proj|down_proj|w2)"
"""Matrices that tensor parallelism divides by columns; others are divided by rows."""
COLUMN_SCALES = re.compile(rf".*\.{COLUMNS}\.(scales|weight_scale(?:_inv)?)")
EXPERTS = re.compile(r".*\.experts\..*")
