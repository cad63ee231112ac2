"""Makes test/golden/adapters/smollm2-r16.json: what PEFT says of a rank-16 adapter on the real SmolLM2-135M-Instruct.

The base is the GGUF file dequantised to f32 (gguf-py) in transformers; the adapter is the one that
test/support/make-peft-adapter.ts writes. Rank 4 is a dense f64 SVD of every module's delta. No rankgate arithmetic runs.

    npx tsx test/support/make-peft-adapter.ts /tmp/smol-r16
    venv/bin/python test/oracle/peft-smollm2.py SmolLM2-135M-Instruct.Q4_1.gguf /tmp/smol-r16     (minutes)
"""

import hashlib
import json
import os
import pathlib
import re
import sys

os.environ["HF_HUB_OFFLINE"] = "1"

import gguf
import numpy as np
import peft
import torch
import transformers

MODEL, ADAPTER = sys.argv[1:3]
RANK = 4
TOP = 20
# Token ids, so that no tokenizer is part of this: arbitrary ones below 49152.
PROMPTS = [[1, 4093, 198, 1780, 314, 260, 3575, 282, 4649, 47, 2], [338, 12, 9000, 41, 31000, 7, 5, 260]]
NAMES = {
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
    "attn_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
}


def load_base():
    reader = gguf.GGUFReader(MODEL)
    heads = {"attn_q": 9, "attn_k": 3}
    state = {}
    for t in reader.tensors:
        x = gguf.dequantize(t.data, t.tensor_type).astype(np.float32)
        parts = t.name.split(".")
        if parts[0] == "blk":
            if parts[2] in heads:  # GGUF row order (adjacent pairs) -> HF row order (halves)
                h = heads[parts[2]]
                x = x.reshape(h, 32, 2, x.shape[1]).swapaxes(1, 2).reshape(x.shape)
            state[f"model.layers.{parts[1]}.{NAMES[parts[2]]}.weight"] = torch.from_numpy(x.copy())
        else:
            name = {"token_embd": "model.embed_tokens", "output_norm": "model.norm"}[parts[0]]
            state[name + ".weight"] = torch.from_numpy(x.copy())
    state["lm_head.weight"] = state["model.embed_tokens.weight"]
    config = transformers.LlamaConfig(
        vocab_size=49152, hidden_size=576, intermediate_size=1536, num_hidden_layers=30, num_attention_heads=9,
        num_key_value_heads=3, head_dim=64, max_position_embeddings=8192, rms_norm_eps=1e-5,
        rope_parameters={"rope_type": "default", "rope_theta": 100000.0}, tie_word_embeddings=True,
        attn_implementation="eager",
    )
    model = transformers.LlamaForCausalLM(config).float().eval()
    model.load_state_dict(state)
    return model


def truncate(model):
    """Every module's B and A replaced by the best rank-4 approximation of their product (scale unchanged)."""
    for module in model.modules():
        if isinstance(module, peft.tuners.lora.LoraLayer):
            a, b = module.lora_A["default"].weight, module.lora_B["default"].weight
            u, s, vt = torch.linalg.svd(b.double() @ a.double(), full_matrices=False)
            a.zero_()
            b.zero_()
            b[:, :RANK] = (u[:, :RANK] * s[:RANK]).float()
            a[:RANK] = vt[:RANK].float()


def tops(model):
    rows = []
    for ids in PROMPTS:
        logits = model(torch.tensor([ids])).logits[0]
        top = logits.topk(TOP, dim=-1)
        rows.append([
            {"tokens": t.tolist(), "logits": [round(x, 5) for x in v.tolist()]} for t, v in zip(top.indices, top.values)
        ])
    return rows


torch.set_num_threads(1)
with torch.no_grad():
    base = load_base()
    answers = {"0": tops(base)}
    model = peft.PeftModel.from_pretrained(base, ADAPTER).eval()
    answers["16"] = tops(model)
    truncate(model)
    answers[str(RANK)] = tops(model)
out = {
    "versions": {p.__name__: p.__version__ for p in (torch, peft, transformers, np)} | {"gguf": "0.19.0"},
    "command": "venv/bin/python test/oracle/peft-smollm2.py SmolLM2-135M-Instruct.Q4_1.gguf /tmp/smol-r16",
    "adapterSha256": hashlib.sha256((pathlib.Path(ADAPTER) / "adapter_model.safetensors").read_bytes()).hexdigest(),
    "prompts": PROMPTS,
    "answers": answers,
}
text = re.sub(r"\[[-\d\s.,e]+\]", lambda m: re.sub(r"\s+", " ", m[0]).replace("[ ", "[").replace(" ]", "]"), json.dumps(out, indent=1))
pathlib.Path("test/golden/adapters/smollm2-r16.json").write_text(text + "\n")
for rank, answer in answers.items():
    print(rank, [[row["tokens"][0] for row in rows] for rows in answer], answer[0][-1]["logits"][:3])
