"""`phi3`: Phi-3, 3.5 and 4. Its qkv and its gate and up projections are one tensor each.

Phi-4-mini rotates only the first part of each head; the frequencies say so.
"""

from duetto.checkpoints.config import ModelConfig
from duetto.models.decoder import ProgramBuilder, onto_residual
from duetto.program.program import Program


def program(config: ModelConfig, max_model_len: int) -> Program:
    model = ProgramBuilder(config, max_model_len)
    model.embed()
    for layer in range(len(config.layers)):
        name = f"model.layers.{layer}"
        model.norm(f"{name}.input_layernorm", model.hidden, model.normed)
        model.linear(model.normed, model.qkv, f"{name}.self_attn.qkv_proj")
        model.rotate(layer)
        model.attend(layer)
        onto_residual(model, model.attended, f"{name}.self_attn.o_proj")
        model.norm(f"{name}.post_attention_layernorm", model.hidden, model.normed)
        model.linear(model.normed, model.gate_up, f"{name}.mlp.gate_up_proj")
        model.activate()
        onto_residual(model, model.activated, f"{name}.mlp.down_proj")
    return model.finish()
