"""`llama`: Llama 1 to 3.3 and all who share their architecture (SmolLM2, TinyLlama, Yi, ...)."""

from duetto.checkpoints.config import ModelConfig
from duetto.models.decoder import (
    ProgramBuilder,
    onto_residual,
    separate_gate_up,
    separate_qkv,
)
from duetto.program.program import Program


def program(config: ModelConfig, max_model_len: int) -> Program:
    model = ProgramBuilder(config, max_model_len)
    model.embed()
    for layer in range(len(config.layers)):
        name = f"model.layers.{layer}"
        model.norm(f"{name}.input_layernorm", model.hidden, model.normed)
        separate_qkv(model, f"{name}.self_attn", bias=config.attention_bias)
        model.rotate(layer)
        model.attend(layer)
        onto_residual(model, model.attended, f"{name}.self_attn.o_proj", bias=config.attention_bias)
        model.norm(f"{name}.post_attention_layernorm", model.hidden, model.normed)
        separate_gate_up(model, f"{name}.mlp", bias=config.mlp_bias)
        model.activate()
        onto_residual(model, model.activated, f"{name}.mlp.down_proj", bias=config.mlp_bias)
    return model.finish()
