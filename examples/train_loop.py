"""A training loop in your own hands: a routed decoder on Python's documentation, 40 lines, no trainer.

`python examples/train_loop.py [STEPS]`
"""

import sys

import numpy as np

import minimoe as mm
from minimoe.data.batches import batch, windows
from minimoe.data.corpus import load_corpus
from minimoe.generation.sampling import Sampling
from minimoe.training.evaluation import evaluate

STEPS, BATCH, CONTEXT = int(sys.argv[1]) if len(sys.argv) > 1 else 200, 16, 64

corpus = load_corpus(mm.DataConfig(source="python-docs", tokenizer="byte"))
config = mm.ModelConfig(
    vocab_size=corpus.tokenizer.vocab_size, d_model=64, n_layers=2, n_heads=4, d_hidden=128, max_seq_len=CONTEXT,
    moe=mm.MoEConfig(n_experts=8, top_k=2, aux_loss_coef=0.01),
)  # fmt: skip
model = mm.Transformer(config, seed=0)
optimizer = mm.optim.AdamW(model.parameters(), lr=2e-3, weight_decay=0.1)

for step in range(STEPS):
    tokens, targets = batch(corpus.train, seed=0, step=step, micro=0, batch_size=BATCH, seq_len=CONTEXT)  # [B,T] each
    parts = model.loss(tokens, targets, rng=mm.Rng(seed=0, step=step))
    parts.total.backward()  # cross-entropy and the router's losses
    norm = optimizer.grad_norm()
    optimizer.step(scale=optimizer.clip_scale(norm, 1.0))
    optimizer.zero_grad()
    if step % 20 == 0 or step == STEPS - 1:
        load = np.mean([stats.load for stats in parts.stats], axis=0)
        print(f"step {step:4d}  loss {parts.cross_entropy.item():.3f}  gradient norm {float(norm):.2f}  expert load {np.round(load, 2)}")

result = evaluate(model, windows(corpus.val, CONTEXT, BATCH))
print(f"validation loss {result.loss:.3f} nats a token")
print("".join(mm.generate(model, corpus.tokenizer, "The ", 200, Sampling(top_k=40))))
