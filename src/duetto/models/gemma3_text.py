"""`gemma3_text`: Gemma 2's layers with normed queries and keys instead of capped scores.

Windowed layers and full layers rotate with frequencies of their own.
"""

from duetto.checkpoints.config import ModelConfig
from duetto.models.decoder import ProgramBuilder, separate_gate_up, separate_qkv
from duetto.program.program import Program


def program(config: ModelConfig, max_model_len: int) -> Program:
    model = ProgramBuilder(config, max_model_len, norm_offset=1.0)
    branch = model.buffer("branch", config.hidden_size)
    model.embed(scale=config.hidden_size**0.5)
    for layer in range(len(config.layers)):
        name = f"model.layers.{layer}"
        model.norm(f"{name}.input_layernorm", model.hidden, model.normed)
        separate_qkv(model, f"{name}.self_attn", bias=config.attention_bias)
        model.head_norm(f"{name}.self_attn.q_norm", model.q)
        model.head_norm(f"{name}.self_attn.k_norm", model.k)
        model.rotate(layer)
        model.attend(layer)
        model.linear(model.attended, branch, f"{name}.self_attn.o_proj", bias=config.attention_bias)
        model.norm(f"{name}.post_attention_layernorm", branch, branch)
        model.add(model.hidden, branch, model.hidden)
        model.norm(f"{name}.pre_feedforward_layernorm", model.hidden, model.normed)
        separate_gate_up(model, f"{name}.mlp")
        model.activate()
        model.linear(model.activated, branch, f"{name}.mlp.down_proj")
        model.norm(f"{name}.post_feedforward_layernorm", branch, branch)
        model.add(model.hidden, branch, model.hidden)
    return model.finish()
