"""What an output layer in 8 bits costs: KL divergence from the same model with it in 16.

``python quantizers/bench/output_layer.py [MODEL] [--samples 4] [--length 512]``, on held-out parts
of Python's sources. All other layers stay in 16 bits, so that the difference is the output layer's
alone; both products are rounded to bfloat16.
"""

from __future__ import annotations

import argparse

import torch
from transformers import AutoModelForCausalLM

from nybble.kernels.packed import round_to_int8
from nybble.loaders import resolve_model
from nybble.quantizers.corpus import text_tokens

_ROWS = 128  # whose logits exist at a time


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("model", nargs="?", default="demo")
    parser.add_argument("--samples", type=int, default=4)
    parser.add_argument("--length", type=int, default=512)
    options = parser.parse_args()
    folder = resolve_model(options.model)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)
    model.train(False)
    torch.manual_seed(0)
    tokens = text_tokens(folder, None, "held-out", options.samples, options.length)
    head = model.lm_head.weight.detach()
    rounded = round_to_int8(head, 128).dequantize().to(head.dtype)
    divergences, losses, others = [], [], 0
    with torch.no_grad():
        for window in tokens:
            hidden = model.base_model(window[None], use_cache=False).last_hidden_state[0]
            for rows, labels in zip(hidden[:-1].split(_ROWS), window[1:].split(_ROWS), strict=True):
                each = [torch.log_softmax((rows @ w.T).double(), -1) for w in (head, rounded)]
                divergences.append((each[0].exp() * (each[0] - each[1])).sum(-1))
                losses.append(torch.stack([-p.gather(1, labels[:, None])[:, 0] for p in each]))
                others += int((each[0].argmax(-1) != each[1].argmax(-1)).sum())
    found, (plain, own) = torch.cat(divergences), torch.cat(losses, 1).mean(1)
    print(
        f"{len(found)} tokens: KL divergence {found.mean():.2g} (largest {found.max():.2g}), "
        f"loss {plain:.4f} in 16 bits, {own:.4f} in 8; another likeliest token: "
        f"{others / len(found):.2%}"
    )


if __name__ == "__main__":
    main()
