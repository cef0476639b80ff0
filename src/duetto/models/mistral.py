"""`mistral`: Llama's layers without biases, where a token sees a window of the tokens before it."""

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
        separate_qkv(model, f"{name}.self_attn")
        model.rotate(layer)
        model.attend(layer)  # the window is the layer's, in the config
        onto_residual(model, model.attended, f"{name}.self_attn.o_proj")
        model.norm(f"{name}.post_attention_layernorm", model.hidden, model.normed)
        separate_gate_up(model, f"{name}.mlp")
        model.activate()
        onto_residual(model, model.activated, f"{name}.mlp.down_proj")
    return model.finish()
