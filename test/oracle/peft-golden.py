"""Makes test/golden/tiny (a tiny random Llama as GGUF) and test/golden/adapters (PEFT adapters on it and their logits).

What each golden adapter must do is computed here by transformers and PEFT alone: full rank by PeftModel, smaller ranks
by a dense f64 SVD of every module's scaled B.A, added to the base weights. No rankgate code runs.

    python3 -m venv venv && venv/bin/pip install torch==2.15.0 peft==0.21.2 transformers==5.24.0 gguf==0.19.0
    venv/bin/python test/oracle/peft-golden.py        (from the repository's root; seed 4, about 10 s)
"""

import copy
import json
import os
import pathlib
import re
import shutil
import tempfile

os.environ["HF_HUB_OFFLINE"] = "1"

import gguf
import numpy as np
import peft
import safetensors.torch
import tokenizers
import torch
import transformers

SEED = 4
COMMAND = "venv/bin/python test/oracle/peft-golden.py"
TINY = pathlib.Path("test/golden/tiny")
ADAPTERS = pathlib.Path("test/golden/adapters")
VOCAB, WIDTH, BLOCKS, HEADS, KV_HEADS, HEAD_SIZE, FFN = 320, 64, 2, 4, 2, 16, 96
SPECIALS = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
# What the merges are learnt from: any text does.
CORPUS = (
    "the small model answers the question that the client asked and the gateway counts the time it has. "
    "an adapter changes the answer; a rank says how much of the adapter is there. one two three four five. "
    "there is no other way than to try, to measure and to write down what was seen in the end. "
) * 4
PROMPTS = ["The capital of France is", "one two three 1234", "def f(x):\n    return", "Grüße, 世界! 🙂"]
VERSIONS = {p.__name__: p.__version__ for p in (torch, peft, transformers, np)} | {"gguf": "0.19.0"}
NAMES = {
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
}
ALL = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
CASES = {
    "plain-r4": dict(r=4, lora_alpha=8, target_modules=["q_proj", "k_proj", "v_proj", "o_proj"]),
    "rslora-r8": dict(r=8, lora_alpha=12, use_rslora=True, target_modules=["q_proj", "k_proj", "up_proj", "down_proj"]),
    "patterns-r16": dict(
        r=16,
        lora_alpha=16,
        target_modules=ALL,
        rank_pattern={"layers.1.mlp.down_proj": 8, "k_proj": 2, r".*\.0\.mlp\.up_proj": 24},
        alpha_pattern={"o_proj": 40, r"model\.layers\.\d\.mlp\.(gate|up)_proj": 8},
    ),
    "qv-r8": dict(r=8, lora_alpha=16, target_modules=["q_proj", "v_proj"]),
    "bf16-r8": dict(r=8, lora_alpha=8, target_modules=ALL),
    # More ranks than any matrix has: the file keeps 256, of which 64 and 32 are there.
    "bf16-r256": dict(r=256, lora_alpha=128, use_rslora=True, target_modules=["q_proj", "v_proj"], layers_to_transform=[1]),
    "regex-r64": dict(r=64, lora_alpha=64, target_modules=r".*\.(q|k|v|o|gate|up|down)_proj"),
}

# Adapters that PEFT makes and rankgate refuses, by the field that it names: only their configs are kept.
REFUSED = {
    "use_dora": dict(r=4, use_dora=True, target_modules=["q_proj"]),
    "bias": dict(r=4, bias="all", target_modules=["q_proj"]),
    "lora_bias": dict(r=4, lora_bias=True, target_modules=["q_proj"]),
    "modules_to_save": dict(r=4, target_modules=["q_proj"], modules_to_save=["embed_tokens"]),
    "init_lora_weights": dict(r=4, init_lora_weights="pissa", target_modules=["q_proj"]),
    "trainable_token_indices": dict(r=4, trainable_token_indices=[1, 2], target_modules=["q_proj"]),
    "layer_replication": dict(r=4, target_modules=["q_proj"], layer_replication=[[0, 2], [1, 2]]),
    "target_parameters": dict(r=4, target_parameters=["mlp.up_proj.weight"], target_modules=[]),
}


def write_json(path, value):
    """Indented, with each list of numbers on one line."""
    text = json.dumps(value, ensure_ascii=False, indent=1)
    text = re.sub(r"\[[-\d\s.,e]+\]", lambda m: re.sub(r"\s+", " ", m[0]).replace("[ ", "[").replace(" ]", "]"), text)
    path.write_text(text + "\n")


def make_tokenizer():
    bpe = tokenizers.Tokenizer(tokenizers.models.BPE())
    bpe.pre_tokenizer = tokenizers.pre_tokenizers.Sequence(
        [tokenizers.pre_tokenizers.Digits(individual_digits=True), tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    bpe.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=VOCAB,
        special_tokens=SPECIALS,
        initial_alphabet=sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    bpe.train_from_iterator([CORPUS], trainer)
    assert bpe.get_vocab_size() == VOCAB
    return bpe


def make_model():
    config = transformers.LlamaConfig(
        vocab_size=VOCAB,
        hidden_size=WIDTH,
        intermediate_size=FFN,
        num_hidden_layers=BLOCKS,
        num_attention_heads=HEADS,
        num_key_value_heads=KV_HEADS,
        head_dim=HEAD_SIZE,
        max_position_embeddings=2048,
        rms_norm_eps=1e-5,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
        tie_word_embeddings=True,
        bos_token_id=1,
        eos_token_id=2,
        attn_implementation="eager",
    )
    model = transformers.LlamaForCausalLM(config).float().eval()
    generator = torch.Generator().manual_seed(SEED)
    with torch.no_grad():
        for name, p in model.named_parameters():
            noise = torch.randn(p.shape, generator=generator)
            if p.dim() == 1:
                p.copy_(1 + 0.1 * noise)
            elif "embed" in name:
                p.copy_(0.3 * noise)
                p[: len(SPECIALS)] *= 0.1  # Never the best token: a greedy run goes on to its limit.
            else:
                p.copy_(1.5 * noise / p.shape[1] ** 0.5)
    return model


def permute(w, heads):
    """HF row order (halves) -> GGUF row order (adjacent pairs)."""
    return w.reshape(heads, 2, HEAD_SIZE // 2, -1).swapaxes(1, 2).reshape(w.shape)


def write_gguf(model, bpe, path):
    w = gguf.GGUFWriter(path, "llama")
    w.add_name("Rankgate Tiny Random")
    w.add_basename("rankgate-tiny")
    w.add_size_label("0.1M")
    w.add_vocab_size(VOCAB)
    w.add_context_length(2048)
    w.add_embedding_length(WIDTH)
    w.add_block_count(BLOCKS)
    w.add_feed_forward_length(FFN)
    w.add_head_count(HEADS)
    w.add_head_count_kv(KV_HEADS)
    w.add_rope_dimension_count(HEAD_SIZE)
    w.add_rope_freq_base(10000.0)
    w.add_layer_norm_rms_eps(1e-5)
    w.add_file_type(gguf.LlamaFileType.ALL_F32)
    w.add_tokenizer_model("gpt2")
    w.add_tokenizer_pre("smollm")
    texts = sorted(bpe.get_vocab(), key=bpe.get_vocab().get)
    w.add_token_list(texts)
    w.add_token_types([3 if t in SPECIALS else 1 for t in texts])
    w.add_token_merges([" ".join(m) for m in json.loads(bpe.to_str())["model"]["merges"]])
    w.add_bos_token_id(1)
    w.add_eos_token_id(2)
    w.add_pad_token_id(2)
    w.add_unk_token_id(0)
    w.add_add_bos_token(False)
    w.add_add_space_prefix(False)
    w.add_chat_template(TEMPLATE)
    for name, p in model.named_parameters():
        a = p.detach().numpy()
        if name == "model.embed_tokens.weight":
            to = "token_embd.weight"
        elif name == "model.norm.weight":
            to = "output_norm.weight"
        else:
            _, _, block, rest = name.split(".", 3)
            key = rest.removesuffix(".weight")
            to = f"blk.{block}.{NAMES[key]}.weight"
            if key.endswith("q_proj"):
                a = permute(a, HEADS)
            if key.endswith("k_proj"):
                a = permute(a, KV_HEADS)
        w.add_tensor(to, np.ascontiguousarray(a))
    w.write_header_to_file()
    w.write_kv_data_to_file()
    w.write_tensors_to_file()
    w.close()


def greedy(model, ids, count):
    """The continuation and how far the best token was ahead of the second at the closest step."""
    ids, margin = list(ids), float("inf")
    with torch.no_grad():
        for _ in range(count):
            top = model(torch.tensor([ids])).logits[0, -1].topk(2)
            margin = min(margin, float(top.values[0] - top.values[1]))
            ids.append(int(top.indices[0]))
    return ids[-count:], margin


def base_golden(model, bpe):
    runs = []
    for prompt in PROMPTS:
        ids = bpe.encode(prompt).ids
        tokens, margin = greedy(model, ids, 32)
        runs.append({"prompt": prompt, "ids": ids, "greedy": tokens, "marginMin": round(margin, 5)})
    out = {"versions": VERSIONS, "command": COMMAND, "seed": SEED, "note": "greedy does not stop at end tokens", "runs": runs}
    write_json(TINY / "greedy.json", out)


def fill(peft_model, seed):
    """Non-trivial A and B whose singular values fall off, so that every rank counts and each less than the one before."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, p in peft_model.named_parameters():
            if "lora_A" in name:
                p.copy_(torch.randn(p.shape, generator=generator) / p.shape[1] ** 0.5)
            if "lora_B" in name:
                decay = 0.8 ** torch.arange(p.shape[1], dtype=torch.float32)
                p.copy_(torch.randn(p.shape, generator=generator) * decay * 0.04)


def lora_layers(peft_model):
    return [(n, m) for n, m in peft_model.named_modules() if isinstance(m, peft.tuners.lora.LoraLayer)]


def truncated(base, peft_model, rank):
    """The base with every module's delta cut to its best approximation of that rank."""
    model = copy.deepcopy(base)
    with torch.no_grad():
        for name, layer in lora_layers(peft_model):
            a, b = (x["default"].weight.double() for x in (layer.lora_A, layer.lora_B))
            u, s, vt = torch.linalg.svd(layer.scaling["default"] * (b @ a), full_matrices=False)
            delta = (u[:, :rank] * s[:rank]) @ vt[:rank]
            weight = model.get_submodule(name.removeprefix("base_model.model.")).weight
            weight.copy_((weight.double() + delta).float())
    return model


def adapter_golden(base, name, fields, ids):
    path = ADAPTERS / name
    config = peft.LoraConfig(task_type="CAUSAL_LM", **fields)
    model = peft.get_peft_model(copy.deepcopy(base), config).eval()
    model.peft_config["default"].base_model_name_or_path = "rankgate/tiny-random"
    fill(model, SEED + len(name) + fields["r"])
    if name.startswith("bf16"):
        for _, layer in lora_layers(model):
            layer.lora_A.bfloat16().float()
            layer.lora_B.bfloat16().float()
    model.save_pretrained(path, save_embedding_layers=False)
    (path / "README.md").unlink(missing_ok=True)
    saved = json.loads((path / "adapter_config.json").read_text())
    if isinstance(saved["target_modules"], list):
        saved["target_modules"].sort()  # PEFT writes a set: another order each time.
    (path / "adapter_config.json").write_text(json.dumps(saved, indent=2, sort_keys=True) + "\n")
    if name.startswith("bf16"):
        file = path / "adapter_model.safetensors"
        tensors = safetensors.torch.load_file(file)
        safetensors.torch.save_file({k: v.to(torch.bfloat16) for k, v in tensors.items()}, file, {"format": "pt"})
    rank_max = max(min(l.lora_A["default"].weight.shape[0], l.in_features, l.out_features) for _, l in lora_layers(model))
    ranks = [k for k in (1, 2, 4, 8, 16, 32) if k < rank_max] + [rank_max]
    x = torch.tensor([ids])
    with torch.no_grad():
        rows = [base(x).logits[0]] + [truncated(base, model, k)(x).logits[0] for k in ranks] + [model(x).logits[0]]
    full = float((rows[-1] - rows[-2]).abs().max())
    assert full < 2e-4, f"{name}: the SVD at full rank and PEFT differ by {full}"
    np.stack([r.numpy() for r in rows]).astype("<f4").tofile(path / "logits.f32")
    info = {
        "versions": VERSIONS,
        "command": COMMAND,
        "ids": ids,
        "rows": [0, *ranks, "peft"],
        "shape": [len(rows), len(ids), VOCAB],
        "effect": [round(float((r - rows[-1]).abs().max()), 4) for r in rows],
        "scaling": {n.removeprefix("base_model.model."): l.scaling["default"] for n, l in lora_layers(model)},
    }
    write_json(path / "logits.json", info)
    print(name, "rank", rank_max, "effect", info["effect"])


def refused_configs(base):
    configs = {}
    for field, fields in REFUSED.items():
        config = peft.LoraConfig(task_type="CAUSAL_LM", **fields)
        model = peft.get_peft_model(copy.deepcopy(base), config)
        with tempfile.TemporaryDirectory() as folder:
            model.save_pretrained(folder, save_embedding_layers=False)
            saved = json.loads((pathlib.Path(folder) / "adapter_config.json").read_text())
        saved["base_model_name_or_path"] = "rankgate/tiny-random"
        configs[field] = saved
    write_json(ADAPTERS / "refused.json", {"versions": VERSIONS, "command": COMMAND, "configs": configs})


def main():
    torch.manual_seed(SEED)
    torch.set_num_threads(1)
    for folder in (TINY, *(ADAPTERS / name for name in CASES)):
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
    bpe, model = make_tokenizer(), make_model()
    write_gguf(model, bpe, TINY / "tiny-f32.gguf")
    base_golden(model, bpe)
    ids = bpe.encode("the answer of the 7 adapters!").ids
    for name, fields in CASES.items():
        adapter_golden(model, name, fields, ids)
    refused_configs(model)


main()
