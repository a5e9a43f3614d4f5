"""What original releases call a transformer's matrices where diffusers has other names.

ComfyUI and kohya's trainer write LoRAs under these names: `diffusion_model.double_blocks.0.img_attn.qkv` and
`lora_unet_double_blocks_0_img_attn_qkv`. Query, key and value are one matrix there.
"""

from __future__ import annotations

import re

Names = dict[str, list[str]]

# Original name -> diffusers' modules, in the order in which they lie in one matrix.
_FLUX2: Names = {
    "double_blocks.{}.img_attn.qkv": [f"transformer_blocks.{{}}.attn.to_{x}" for x in "qkv"],
    "double_blocks.{}.txt_attn.qkv": [f"transformer_blocks.{{}}.attn.add_{x}_proj" for x in "qkv"],
    "double_blocks.{}.img_attn.proj": ["transformer_blocks.{}.attn.to_out.0"],
    "double_blocks.{}.txt_attn.proj": ["transformer_blocks.{}.attn.to_add_out"],
    "double_blocks.{}.img_mlp.0": ["transformer_blocks.{}.ff.linear_in"],
    "double_blocks.{}.img_mlp.2": ["transformer_blocks.{}.ff.linear_out"],
    "double_blocks.{}.txt_mlp.0": ["transformer_blocks.{}.ff_context.linear_in"],
    "double_blocks.{}.txt_mlp.2": ["transformer_blocks.{}.ff_context.linear_out"],
    "single_blocks.{}.linear1": ["single_transformer_blocks.{}.attn.to_qkv_mlp_proj"],
    "single_blocks.{}.linear2": ["single_transformer_blocks.{}.attn.to_out"],
    "img_in": ["x_embedder"],
    "txt_in": ["context_embedder"],
    "final_layer.linear": ["proj_out"],
    "single_stream_modulation.lin": ["single_stream_modulation.linear"],
    "double_stream_modulation_img.lin": ["double_stream_modulation_img.linear"],
    "double_stream_modulation_txt.lin": ["double_stream_modulation_txt.linear"],
}
_SD3: Names = {
    "joint_blocks.{}.x_block.attn.qkv": [f"transformer_blocks.{{}}.attn.to_{x}" for x in "qkv"],
    "joint_blocks.{}.x_block.attn2.qkv": [f"transformer_blocks.{{}}.attn2.to_{x}" for x in "qkv"],
    "joint_blocks.{}.context_block.attn.qkv": [f"transformer_blocks.{{}}.attn.add_{x}_proj" for x in "qkv"],
    "joint_blocks.{}.x_block.attn.proj": ["transformer_blocks.{}.attn.to_out.0"],
    "joint_blocks.{}.x_block.attn2.proj": ["transformer_blocks.{}.attn2.to_out.0"],
    "joint_blocks.{}.context_block.attn.proj": ["transformer_blocks.{}.attn.to_add_out"],
    "joint_blocks.{}.x_block.mlp.fc1": ["transformer_blocks.{}.ff.net.0.proj"],
    "joint_blocks.{}.x_block.mlp.fc2": ["transformer_blocks.{}.ff.net.2"],
    "joint_blocks.{}.context_block.mlp.fc1": ["transformer_blocks.{}.ff_context.net.0.proj"],
    "joint_blocks.{}.context_block.mlp.fc2": ["transformer_blocks.{}.ff_context.net.2"],
    "joint_blocks.{}.x_block.adaLN_modulation.1": ["transformer_blocks.{}.norm1.linear"],
    "context_embedder": ["context_embedder"],
    "t_embedder.mlp.0": ["time_text_embed.timestep_embedder.linear_1"],
    "t_embedder.mlp.2": ["time_text_embed.timestep_embedder.linear_2"],
    "y_embedder.mlp.0": ["time_text_embed.text_embedder.linear_1"],
    "y_embedder.mlp.2": ["time_text_embed.text_embedder.linear_2"],
    "final_layer.linear": ["proj_out"],
}
ORIGINAL = {"Flux2Transformer2DModel": _FLUX2, "SD3Transformer2DModel": _SD3}  # by transformer class

# Matrices that give shift and scale alone have them the other way round in diffusers.
SD3_MODULATIONS: Names = {
    "joint_blocks.{}.context_block.adaLN_modulation.1": ["transformer_blocks.{}.norm1_context.linear"],
    "final_layer.adaLN_modulation.1": ["norm_out.linear"],
}


def module_pattern(name: str, separator: str = r"\.") -> re.Pattern[str]:
    """Finds a name of these tables with any number in its `{}`; `separator` is what may stand for its dots."""
    return re.compile(re.escape(name).replace(r"\{\}", r"(\d+)").replace(r"\.", separator))
