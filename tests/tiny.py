"""A complete model folder small enough to build in a test: random weights, a real tokenizer."""

from __future__ import annotations

import json
from collections.abc import Sequence
from copy import deepcopy
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Literal

import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    Lfm2Config,
    Lfm2ForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    PreTrainedModel,
    Qwen2Config,
    Qwen2ForCausalLM,
)

BOS, USER_TURN, EOS = "<|endoftext|>", "<|im_start|>", "<|im_end|>"

CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{% if message['role'] not in ['system', 'user', 'assistant'] %}"
    "{{ raise_exception('unknown role ' + message['role']) }}"
    "{% endif %}"
    "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)

# Enough text for some merges: tokens of several characters, and characters of several tokens.
CORPUS = (
    "the quick brown fox jumps over the lazy dog and then the other dog barks at the moon",
    "def add(first, second):\n    return first + second\n\nfor item in items:\n    print(item)",
    "naïve café, größer, Ελληνικά, русский, 日本語, emoji 🙂🚀",
)


def write_tokenizer(folder: Path, *, vocab_size: int, max_length: int) -> int:
    """Write a byte-level BPE tokenizer with a chat template; returns how many tokens it has.

    Every byte is a token, so any text survives encoding and decoding.
    """
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[BOS, USER_TURN, EOS],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
    tokenizer.save(str(folder / "tokenizer.json"))
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": BOS,
        "eos_token": EOS,
        "pad_token": BOS,
        "chat_template": CHAT_TEMPLATE,
        "clean_up_tokenization_spaces": False,
        "model_max_length": max_length,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(settings, indent=2))
    return tokenizer.get_vocab_size()


def write_tiny_model(
    folder: Path,
    *,
    family: Literal["lfm2", "llama", "mistral", "qwen2"] = "qwen2",
    vocab_size: int = 320,
    hidden_size: int = 128,
    layers: int = 2,
    max_length: int = 512,
    tie_word_embeddings: bool = False,
    sliding_window: int | None = None,
    full_layers: int = 0,
    seed: int = 0,
) -> Path:
    """Write config.json, model.safetensors (bfloat16) and a tokenizer to ``folder``; returns it.

    Four query heads share two key/value heads; ``qwen2`` has biases on q, k and v. ``mistral`` may
    have a sliding window in all layers, ``qwen2`` in those after ``full_layers``. The first layer
    of ``lfm2`` keeps states. The weights are scaled so that logits spread over several units:
    greedy choices are not decided by rounding.
    """
    folder.mkdir(parents=True, exist_ok=True)
    tokens = write_tokenizer(folder, vocab_size=vocab_size, max_length=max_length)
    config_class, model_class = {
        "lfm2": (Lfm2Config, Lfm2ForCausalLM),
        "llama": (LlamaConfig, LlamaForCausalLM),
        "mistral": (MistralConfig, MistralForCausalLM),
        "qwen2": (Qwen2Config, Qwen2ForCausalLM),
    }[family]
    window: dict[str, object] = {}
    if family == "lfm2":
        window["layer_types"] = ["conv", *["full_attention"] * (layers - 1)]
    if sliding_window is not None:
        window["sliding_window"] = sliding_window
        if family == "qwen2":
            window |= {"use_sliding_window": True, "max_window_layers": full_layers}
    config = config_class(
        vocab_size=tokens,
        hidden_size=hidden_size,
        intermediate_size=2 * hidden_size,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=max_length,
        tie_word_embeddings=tie_word_embeddings,
        bos_token_id=0,
        eos_token_id=2,
        dtype="bfloat16",
        **window,
    )
    model = model_class(config)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name:
                parameter.fill_(1.0)
            elif name.endswith("bias"):
                parameter.normal_(std=0.1, generator=generator)
            elif "embed_tokens" in name or "lm_head" in name:
                parameter.normal_(std=0.3, generator=generator)
            else:
                parameter.normal_(std=parameter.shape[1] ** -0.5, generator=generator)
    model.to(torch.bfloat16).save_pretrained(folder)
    return folder


ALL_PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


def write_tiny_adapter(
    folder: Path,
    model: Path,
    *,
    seed: int = 0,
    steps: int = 3,
    ia3: bool = False,
    **options: object,
) -> Path:
    """Train a LoRA on the tiny model ``model`` with peft and save it to ``folder``; returns it.

    A few steps at a high rate towards random text, so that it visibly changes what the model says.
    ``options`` are LoraConfig's; by default rank 4, alpha 8, on all projections. ia3: train (IA)³
    instead; they are IA3Config's, by default all projections and the inputs of down_proj.
    """
    from peft import IA3Config, LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    torch.manual_seed(seed)
    kind = IA3Config if ia3 else LoraConfig
    own = {"feedforward_modules": ["down_proj"]} if ia3 else {"r": 4, "lora_alpha": 8}
    settings = {"target_modules": list(ALL_PROJECTIONS)} | own | options
    base = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    adapted = get_peft_model(base, kind(task_type="CAUSAL_LM", **settings))
    trained = [parameter for parameter in adapted.parameters() if parameter.requires_grad]
    optimizer = torch.optim.Adam(trained, lr=0.03)
    text = torch.randint(3, base.config.vocab_size, (2, 24))
    for _ in range(steps):
        adapted(input_ids=text, labels=text).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    adapted.save_pretrained(folder)
    return folder


def write_tiny_eagle3(
    folder: Path,
    target: Path,
    *,
    vocab: int = 200,
    seed: int = 0,
    captured: Sequence[int] = (0, 1, 2),
    **settings: object,
) -> Path:
    """Write an EAGLE-3 head of a tiny model, with random weights, as SpecForge saves one.

    It shares the model's embedding. vocab: tokens that it drafts. captured: layers whose inputs it
    reads. settings: of its config.json, beside or instead of those here.
    """
    about = json.loads((target / "config.json").read_text())
    hidden, whole = about["hidden_size"], about["vocab_size"]
    generator = torch.Generator().manual_seed(seed)

    def weight(rows: int, columns: int) -> torch.Tensor:
        return torch.randn(rows, columns, generator=generator) * columns**-0.5

    config: dict[str, object] = {
        "architectures": ["LlamaForCausalLMEagle3"],
        "model_type": "llama",
        "hidden_size": hidden,
        "intermediate_size": 192,
        "num_hidden_layers": 1,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 32,
        "hidden_act": "silu",
        "rms_norm_eps": 1e-5,
        "max_position_embeddings": 512,
        "vocab_size": whole,
        "draft_vocab_size": vocab,
        "tie_word_embeddings": False,
        "eagle_aux_hidden_state_layer_ids": list(captured),
    }
    drafted = torch.randperm(whole, generator=generator)[:vocab].sort().values
    tensors = {
        "fc.weight": weight(hidden, len(captured) * hidden),
        "midlayer.self_attn.q_proj.weight": weight(128, 2 * hidden),
        "midlayer.self_attn.k_proj.weight": weight(64, 2 * hidden),
        "midlayer.self_attn.v_proj.weight": weight(64, 2 * hidden),
        "midlayer.self_attn.o_proj.weight": weight(hidden, 128),
        "midlayer.mlp.gate_proj.weight": weight(192, hidden),
        "midlayer.mlp.up_proj.weight": weight(192, hidden),
        "midlayer.mlp.down_proj.weight": weight(hidden, 192),
        **{
            f"{name}.weight": torch.rand(hidden, generator=generator) + 0.5
            for name in (
                *("midlayer.hidden_norm", "midlayer.input_layernorm"),
                *("midlayer.post_attention_layernorm", "norm"),
            )
        },
        "lm_head.weight": weight(vocab, hidden),
        "d2t": drafted - torch.arange(vocab),
        "t2d": torch.isin(torch.arange(whole), drafted),
    }
    folder.mkdir(parents=True)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    (folder / "config.json").write_text(json.dumps(config | settings))
    return folder


# Models with MTP heads beside the sizes that they share; 3 of 8 experts.
_MTP_EXPERTS = {"num_experts_per_tok": 3, "moe_intermediate_size": 32}
_MTP_LATENT = {
    "num_key_value_heads": 4,
    "q_lora_rank": 32,
    "kv_lora_rank": 32,
    "qk_nope_head_dim": 32,
    "qk_rope_head_dim": 16,
    "v_head_dim": 16,
}
_MTP_DELTA_NET = {
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 8,
    "linear_key_head_dim": 16,
    "linear_value_head_dim": 16,
}
_MTP: dict[str, dict[str, object]] = {
    "deepseek_v3": {
        **_MTP_LATENT,
        **_MTP_EXPERTS,
        "n_routed_experts": 8,
        "n_group": 4,
        "topk_group": 2,
        "first_k_dense_replace": 1,
        "num_nextn_predict_layers": 1,
    },
    "ernie4_5_moe": {
        "moe_k": 3,
        "moe_num_experts": 8,
        "moe_num_shared_experts": 1,
        "moe_intermediate_size": 32,
        "moe_layer_start_index": 1,
        "num_nextn_predict_layers": 1,
    },
    "glm4_moe": {
        **_MTP_EXPERTS,
        "n_routed_experts": 8,
        "use_qk_norm": True,
        "first_k_dense_replace": 1,
        "num_nextn_predict_layers": 1,
    },
    "glm4_moe_lite": {
        **_MTP_LATENT,
        **_MTP_EXPERTS,
        "n_routed_experts": 8,
        "mlp_layer_types": ["dense", "sparse"],
        "num_nextn_predict_layers": 1,
    },
    "qwen3_next": {
        **_MTP_DELTA_NET,
        **_MTP_EXPERTS,
        "num_experts": 8,
        "shared_expert_intermediate_size": 64,
        "layer_types": ["linear_attention", "full_attention"],
    },
    "qwen3_5_text": {
        **_MTP_DELTA_NET,
        "layer_types": ["linear_attention", "full_attention"],
    },
    "qwen3_5_moe_text": {
        **_MTP_DELTA_NET,
        **_MTP_EXPERTS,
        "num_experts": 8,
        "shared_expert_intermediate_size": 64,
        "layer_types": ["linear_attention", "full_attention"],
    },
}
# A model of the family whose one layer is as a head's.
_MTP_LAYER = {
    "num_hidden_layers": 1,
    "first_k_dense_replace": 0,
    "moe_layer_start_index": 1,  # a head's layer has an MLP
    "mlp_layer_types": ["sparse"],
    "layer_types": ["full_attention"],
}


class TinyMtp(torch.nn.Module):
    """A tiny model's MTP head in plain PyTorch, around a model of transformers with one layer.

    It computes all positions anew for every token. layer: has the target's embeddings and output
    layer, and the head's layer and last norm. shares_norm: whether that is the target's too.
    """

    def __init__(self, layer: PreTrainedModel, seed: int = 0) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        hidden = layer.config.hidden_size
        norm = layer.model.norm
        self.layer = layer
        self.shares_norm = layer.config.model_type == "ernie4_5_moe"
        self.embedding_norm, self.hidden_norm = deepcopy(norm), deepcopy(norm)
        self.join = torch.nn.Linear(2 * hidden, hidden, bias=False)
        with torch.no_grad():
            for each in (norm, self.embedding_norm, self.hidden_norm):
                each.weight += 0.2 * torch.randn(hidden, generator=generator)
            self.join.weight.normal_(std=(2 * hidden) ** -0.5, generator=generator)

    def forward(self, hidden: torch.Tensor, after: torch.Tensor) -> torch.Tensor:
        """Hidden states after the last norm ``(n, hidden)``.

        hidden: of each position, the target's after its last norm, or the head's own of the
        position before. after: the tokens after them ``(n,)``.
        """
        embedded = self.embedding_norm(self.layer.model.embed_tokens(after))
        joined = self.join(torch.cat([embedded, self.hidden_norm(hidden)], dim=-1))
        out = self.layer.model(inputs_embeds=joined[None], use_cache=False).last_hidden_state[0]
        return out  # type: ignore[no-any-return]

    @torch.no_grad()
    def draft(self, hidden: torch.Tensor, tokens: list[int], count: int) -> list[int]:
        """What follows ``tokens``, of which all but the last have hidden states."""
        after, found = tokens[1:], []
        for _ in range(count):
            last = self(hidden, torch.tensor(after))[-1:]
            found.append(int(self.layer.lm_head(last).argmax()))
            hidden, after = torch.cat([hidden, last]), [*after, found[-1]]
        return found

    def tensors(self) -> dict[str, torch.Tensor]:
        """As checkpoints of the family have them, of a model of two layers."""
        with TemporaryDirectory() as folder:
            self.layer.save_pretrained(folder)
            stored = load_file(Path(folder) / "model.safetensors")
        if "linear_num_key_heads" in self.layer.config:
            layer, norm = "mtp.layers.0.", "mtp.norm.weight"
            inputs = ("mtp.pre_fc_norm_embedding", "mtp.pre_fc_norm_hidden", "mtp.fc")
            copies = {}
        elif self.shares_norm:
            layer, norm = "model.mtp_block.0.", "model.norm.weight"
            inputs = tuple(f"model.mtp_{n}.0" for n in ("emb_norm", "hidden_norm", "linear_proj"))
            copies = {}
        else:
            layer = "model.layers.2."
            norm = layer + "shared_head.norm.weight"
            inputs = (layer + "enorm", layer + "hnorm", layer + "eh_proj")
            copies = {
                layer + "embed_tokens.weight": stored["model.embed_tokens.weight"],
                layer + "shared_head.head.weight": stored["lm_head.weight"],
            }
        own = (self.embedding_norm, self.hidden_norm, self.join)
        found = {
            layer + name.removeprefix("model.layers.0."): tensor
            for name, tensor in stored.items()
            if name.startswith("model.layers.0.")
        }
        found |= {f"{n}.weight": m.weight.detach() for n, m in zip(inputs, own, strict=True)}
        found |= {norm: stored["model.norm.weight"], **copies}
        return {name: tensor.to(torch.bfloat16).contiguous() for name, tensor in found.items()}


def write_tiny_mtp(
    folder: Path, family: str = "glm4_moe", *, seed: int = 0, **settings: object
) -> TinyMtp:
    """Write a tiny model of ``family`` with an MTP head to ``folder``; returns the head.

    Both have random weights. settings: of its config.json, beside or instead of those here.
    """
    folder.mkdir(parents=True)
    tokens = write_tokenizer(folder, vocab_size=320, max_length=512)
    sizes: dict[str, object] = {
        "vocab_size": tokens,
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 32,
        "max_position_embeddings": 512,
        "tie_word_embeddings": False,
        "bos_token_id": 0,
        "eos_token_id": 2,
        "pad_token_id": 0,
    }
    about = sizes | _MTP[family] | settings
    if family in ("deepseek_v3", "glm4_moe_lite"):
        del about["head_dim"]
    generator = torch.Generator().manual_seed(seed)
    torch.manual_seed(seed)  # some parameters are random from the start, such as decays

    def model(**changes: object) -> PreTrainedModel:
        config = AutoConfig.for_model(family, **about | changes)
        built: PreTrainedModel = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
        with torch.no_grad():
            for name, parameter in built.named_parameters():
                if parameter.ndim == 1:
                    # Else norms of what is normed already would change nothing.
                    parameter += 0.2 * torch.randn(parameter.shape, generator=generator)
                else:
                    ends = "embed" in name or "lm_head" in name
                    std = 0.3 if ends else parameter.shape[-1] ** -0.5
                    parameter.normal_(std=std, generator=generator)
                # What is stored in 16 bits is what the head computes with.
                parameter.copy_(parameter.bfloat16())
        return built

    target = model()
    changes = {name: value for name, value in _MTP_LAYER.items() if name in about}
    layer = model(**changes)
    layer.model.embed_tokens.weight = target.model.embed_tokens.weight
    layer.lm_head.weight = target.lm_head.weight
    if family == "ernie4_5_moe":
        layer.model.norm.weight = target.model.norm.weight
    head = TinyMtp(layer, seed)
    with torch.no_grad():
        for parameter in head.parameters():
            parameter.copy_(parameter.bfloat16())
    target.to(torch.bfloat16).save_pretrained(folder)
    store_tiny_mtp(folder, head)
    target.float()
    return head


def store_tiny_mtp(folder: Path, head: TinyMtp) -> None:
    """Write a head's tensors beside those of the model in ``folder``, or instead of others."""
    stored = load_file(folder / "model.safetensors")
    save_file(stored | head.tensors(), folder / "model.safetensors", {"format": "pt"})


OWN_EOS = "<|done|>"
OWN_TOKENS = ("<|tool|>", "<plan>", "zyx")


def write_tiny_token_adapter(
    folder: Path,
    model: Path,
    *,
    tokens: Sequence[str] = OWN_TOKENS,
    rows: int | None = None,
    new_rows: Literal["trained", "saved"] = "saved",
    seed: int = 0,
    **options: object,
) -> Path:
    """Train a LoRA on the tiny model ``model`` with tokens of its own, and save both to ``folder``.

    An end token comes first, then ``tokens``. rows: of the resized embedding, if there are more
    than tokens. new_rows: whether those of the new tokens are in ``trainable_token_indices``.
    ``options`` are LoraConfig's.
    """
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM, AutoTokenizer

    torch.manual_seed(seed)
    tokenizer = AutoTokenizer.from_pretrained(model)
    tokenizer.add_special_tokens({"eos_token": OWN_EOS})
    tokenizer.add_tokens(list(tokens))
    base = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    known = base.config.vocab_size
    base.resize_token_embeddings(rows or len(tokenizer), mean_resizing=False)
    with torch.no_grad():
        for weight in (base.get_input_embeddings().weight, base.get_output_embeddings().weight):
            weight[known:].normal_(std=0.8)
    settings = {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "up_proj"]} | options
    if new_rows == "trained":
        new = list(range(known, len(tokenizer)))
        tied = base.config.tie_word_embeddings
        of_both = {"embed_tokens": new, "lm_head": new}
        settings["trainable_token_indices"] = new if tied else of_both
    adapted = get_peft_model(base, LoraConfig(task_type="CAUSAL_LM", **settings))
    trained = [parameter for parameter in adapted.parameters() if parameter.requires_grad]
    optimizer = torch.optim.Adam(trained, lr=0.03)
    text = torch.cat(
        [torch.randint(3, known, (2, 24)), torch.randint(known, len(tokenizer), (2, 9))], 1
    )
    for _ in range(3):
        adapted(input_ids=text, labels=text).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    adapted.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder
