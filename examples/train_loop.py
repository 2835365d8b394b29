"""A 40-line training loop you can edit: a routed decoder on Python's documentation, without the trainer.

`python examples/train_loop.py [STEPS]`. What one step does, from zeroed gradients to the update, is in minimoe/training/step.py.
"""

import sys

import numpy as np

import minimoe as mm
from minimoe.data.batches import batch, windows
from minimoe.data.corpus import load_corpus
from minimoe.generation.sampling import Sampling
from minimoe.training.evaluation import evaluate
from minimoe.training.metrics import unpack
from minimoe.training.step import Step

STEPS, BATCH, CONTEXT, LAYERS, EXPERTS = int(sys.argv[1]) if len(sys.argv) > 1 else 200, 16, 64, 2, 8

corpus = load_corpus(mm.DataConfig(source="python-docs", tokenizer="byte"))
config = mm.ModelConfig(
    vocab_size=corpus.tokenizer.vocab_size, d_model=64, n_layers=LAYERS, n_heads=4, d_hidden=128, max_seq_len=CONTEXT,
    moe=mm.MoEConfig(n_experts=EXPERTS, top_k=2, aux_loss_coef=0.01),
)  # fmt: skip
model = mm.Transformer(config, seed=0)
optimizer = mm.optim.AdamW(model.parameters(), lr=2e-3, weight_decay=0.1)
step = Step(model, optimizer, seed=0, grad_clip=1.0)

for number in range(STEPS):
    tokens, targets = batch(corpus.train, seed=0, step=number, micro=0, batch_size=BATCH, seq_len=CONTEXT)  # [B,T] each
    packed = step(*step.arrays(number, 2e-3, tokens[None], targets[None]))  # one micro-batch: [1,B,T] each
    if number % 20 == 0 or number == STEPS - 1:
        found = unpack(model.backend.to_host(packed).tolist(), LAYERS, EXPERTS)
        load = np.round(np.mean(found["expert_load"], axis=0), 2)
        print(f"step {number:4d}  loss {found['loss']:.3f}  gradient norm {found['grad_norm']:.2f}  expert load {load}")

result = evaluate(model, windows(corpus.val, CONTEXT, BATCH))
print(f"validation loss {result.loss:.3f} nats per token")
print("".join(mm.generate(model, corpus.tokenizer, "The ", 200, Sampling(top_k=40))))
