"""Small generators of the classes of diffusers, with random weights and tokenizers of bytes."""

import importlib
from collections.abc import Callable
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors

from fakes.autoencoders import small_model
from pid_pipelines.backbones import BACKBONES

# Not imports: pyright would read all of their models, for the half of its time.
diffusers: Any = importlib.import_module("diffusers")
transformers: Any = importlib.import_module("transformers")

_SPECIAL = ("<pad>", "<s>", "</s>")
_TEMPLATE = (
    "{% for m in messages %}{% if m['content'] is string %}{{ m['content'] }}{% else %}"
    "{% for part in m['content'] %}{{ part['text'] }}{% endfor %}{% endif %}{% endfor %}"
)
_TEXT: dict[str, Any] = {
    "vocab_size": 259,
    "hidden_size": 16,
    "intermediate_size": 16,
    "head_dim": 8,
}
_HEADS: dict[str, Any] = {"num_attention_heads": 2, "num_key_value_heads": 1}
_IDS: dict[str, Any] = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}


def tokenizer() -> Any:
    """A token for each byte, with one in front and one behind."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: i for i, token in enumerate((*_SPECIAL, *alphabet))}
    inner = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    ends = [("<s>", 1), ("</s>", 2)]
    inner.post_processor = processors.TemplateProcessing("<s> $A </s>", special_tokens=ends)
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=inner,
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="</s>",
        model_max_length=77,
        padding_side="right",
        chat_template=_TEMPLATE,
    )


def _clip(kind: Any) -> Any:
    config = transformers.CLIPTextConfig(
        vocab_size=259,
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        projection_dim=16,
        **_IDS,
    )
    return kind(config)


def _t5(width: int) -> Any:
    config = transformers.T5Config(
        vocab_size=259, d_model=width, d_kv=8, d_ff=16, num_layers=1, num_heads=2, pad_token_id=0
    )
    return transformers.T5EncoderModel(config)


def _mistral() -> Any:
    """Of as many layers as FLUX.2 reads the states of."""
    text = {**_TEXT, **_HEADS, "num_hidden_layers": 30, "model_type": "mistral"}
    vision = {
        "hidden_size": 16,
        "intermediate_size": 16,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "image_size": 32,
        "patch_size": 16,
        "model_type": "pixtral",
    }
    config = transformers.Mistral3Config(text_config=text, vision_config=vision)
    return transformers.Mistral3ForConditionalGeneration(config)


def _qwen3(layers: int) -> Any:
    config = transformers.Qwen3Config(**_TEXT, **_HEADS, num_hidden_layers=layers)
    return transformers.Qwen3ForCausalLM(config)


def _qwen_vl() -> Any:
    text: dict[str, Any] = {
        **_TEXT,
        **_HEADS,
        "num_hidden_layers": 2,
        "rope_scaling": {"type": "default", "mrope_section": [1, 1, 2]},
        "model_type": "qwen2_5_vl_text",
        **_IDS,
    }
    vision = {
        "depth": 1,
        "hidden_size": 16,
        "intermediate_size": 16,
        "num_heads": 2,
        "out_hidden_size": 16,
        "patch_size": 14,
    }
    config = transformers.Qwen2_5_VLConfig(text_config=text, vision_config=vision)
    return transformers.Qwen2_5_VLForConditionalGeneration(config)


def _flow(**options: Any) -> Any:
    return diffusers.FlowMatchEulerDiscreteScheduler(**options)


_SMALL_TRANSFORMER: dict[str, Any] = {
    "num_layers": 1,
    "attention_head_dim": 8,
    "num_attention_heads": 2,
}
_SMALL_FLUX: dict[str, Any] = {**_SMALL_TRANSFORMER, "num_single_layers": 1}


def _flux() -> dict[str, Any]:
    return {
        "scheduler": _flow(use_dynamic_shifting=True),
        "text_encoder": _clip(transformers.CLIPTextModel),
        "text_encoder_2": _t5(16),
        "tokenizer": tokenizer(),
        "tokenizer_2": tokenizer(),
        "transformer": diffusers.FluxTransformer2DModel(
            **_SMALL_FLUX,
            joint_attention_dim=16,
            pooled_projection_dim=16,
            guidance_embeds=True,
            axes_dims_rope=(2, 2, 4),
        ),
        "vae": small_model("flux"),
    }


def _flux2(*, klein: bool) -> dict[str, Any]:
    return {
        "scheduler": _flow(use_dynamic_shifting=True),
        "text_encoder": _qwen3(27) if klein else _mistral(),
        "tokenizer": tokenizer(),
        "transformer": diffusers.Flux2Transformer2DModel(
            **_SMALL_FLUX,
            joint_attention_dim=48,
            timestep_guidance_channels=16,
            axes_dims_rope=(2, 2, 2, 2),
            guidance_embeds=not klein,
        ),
        "vae": small_model("flux2"),
    }


def _sd3() -> dict[str, Any]:
    clip = transformers.CLIPTextModelWithProjection
    return {
        "scheduler": _flow(shift=3.0),
        "text_encoder": _clip(clip),
        "text_encoder_2": _clip(clip),
        "text_encoder_3": _t5(32),
        "tokenizer": tokenizer(),
        "tokenizer_2": tokenizer(),
        "tokenizer_3": tokenizer(),
        "transformer": diffusers.SD3Transformer2DModel(
            **_SMALL_TRANSFORMER,
            sample_size=16,
            joint_attention_dim=32,
            caption_projection_dim=16,
            pooled_projection_dim=32,
            pos_embed_max_size=16,
        ),
        "vae": small_model("sd3"),
    }


def _sdxl() -> dict[str, Any]:
    return {
        "scheduler": diffusers.EulerDiscreteScheduler(
            beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", steps_offset=1
        ),
        "text_encoder": _clip(transformers.CLIPTextModel),
        "text_encoder_2": _clip(transformers.CLIPTextModelWithProjection),
        "tokenizer": tokenizer(),
        "tokenizer_2": tokenizer(),
        "unet": diffusers.UNet2DConditionModel(
            sample_size=16,
            block_out_channels=(8, 16),
            down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
            up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
            layers_per_block=1,
            norm_num_groups=4,
            cross_attention_dim=32,
            attention_head_dim=8,
            use_linear_projection=True,
            addition_embed_type="text_time",
            addition_time_embed_dim=8,
            projection_class_embeddings_input_dim=6 * 8 + 16,
        ),
        "vae": small_model("sdxl"),
    }


def _qwenimage() -> dict[str, Any]:
    return {
        "scheduler": _flow(use_dynamic_shifting=True),
        "text_encoder": _qwen_vl(),
        "tokenizer": tokenizer(),
        "transformer": diffusers.QwenImageTransformer2DModel(
            **_SMALL_TRANSFORMER, joint_attention_dim=16, axes_dims_rope=(2, 2, 4)
        ),
        "vae": small_model("qwenimage"),
    }


def _zimage() -> dict[str, Any]:
    return {
        "scheduler": _flow(shift=6.0),
        "text_encoder": _qwen3(2),
        "tokenizer": tokenizer(),
        "transformer": diffusers.ZImageTransformer2DModel(
            dim=16,
            n_layers=1,
            n_refiner_layers=1,
            n_heads=2,
            n_kv_heads=2,
            cap_feat_dim=16,
            axes_dims=[2, 2, 4],
            axes_lens=[1024, 32, 32],
        ),
        "vae": small_model("flux"),
    }


PARTS: dict[str, Callable[[], dict[str, Any]]] = {
    "flux": _flux,
    "flux2": lambda: _flux2(klein=False),
    "flux2-klein-4b": lambda: {**_flux2(klein=True), "is_distilled": True},
    "sd3": _sd3,
    "sdxl": _sdxl,
    "qwenimage": _qwenimage,
    "zimage": _zimage,
}
"""Components of a pipeline, by a backbone of every class."""


def small_pipeline(backbone: str) -> Any:
    """A pipeline that runs in a moment: the same each time."""
    torch.manual_seed(0)
    pipe = getattr(diffusers, BACKBONES[backbone].pipeline)(**PARTS[backbone]())
    for part in pipe.components.values():
        if isinstance(part, torch.nn.Module):
            part.eval()
    pipe.set_progress_bar_config(disable=True)
    return pipe
