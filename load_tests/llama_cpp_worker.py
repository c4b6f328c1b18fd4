"""llama.cpp behind a pipe; runs in the environment that has ``llama-cpp-python``.

Reads JSON lines ``{"prompt": [token ids], "max_tokens": n}``. Answers each with the tokens, and
with their arrival times in seconds from the start of the prompt.
"""

import json
import sys
import time

from llama_cpp import Llama

model, threads = sys.argv[1], int(sys.argv[2])
llama = Llama(
    model, n_ctx=4096, n_threads=threads, n_threads_batch=threads, n_batch=512, verbose=False
)
print(json.dumps({"ready": True}), flush=True)
for line in sys.stdin:
    request = json.loads(line)
    llama.reset()
    start, arrivals, tokens = time.perf_counter(), [], []
    for token in llama.generate(request["prompt"], temp=0.0, repeat_penalty=1.0):
        arrivals.append(time.perf_counter() - start)
        tokens.append(token)
        if len(tokens) == request["max_tokens"]:
            break
    print(json.dumps({"arrivals": arrivals, "tokens": tokens}), flush=True)
