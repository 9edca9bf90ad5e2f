"""Count a model without building it: parameters by role, FLOPs per token, training memory.

python examples/count_model.py
"""

from stacklm.config.model import Stack, Stacked
from stacklm.config.optimizer import AdamW
from stacklm.config.params import Model
from stacklm.config.train import Train
from stacklm.model.count import count
from stacklm.plan.memory import training_memory
from stacklm.units import quantity

VOCAB_SIZE, CONTEXT = 8192, 512


def main() -> None:
    architecture = Stacked(
        d_model=256,
        n_heads=4,
        stacks=(Stack(layers=16, features=16, d_ff=1024), Stack(layers=16, features=32, d_ff=2048)),
    )
    counts = count(architecture, VOCAB_SIZE, CONTEXT)
    for role, parameters in counts.parameters.items():
        print(f"{role:>10} {parameters:>12,} parameters")
    print(f"{'total':>10} {counts.total:>12,} parameters")
    print(f"forward  {quantity(counts.forward_flops_per_token, 'FLOP')} per token")
    print(f"training {quantity(counts.training_flops_per_token, 'FLOP')} per token")

    train = Train(max_steps=100, warmup_steps=10, context_length=CONTEXT, global_batch_size=8, micro_batch_size=4, threads=1)
    memory = training_memory(Model(architecture, AdamW(peak_lr=1e-3)), VOCAB_SIZE, train)
    low, high = memory.interval
    print(f"memory   {quantity(memory.total, 'B')} ({quantity(low, 'B')} to {quantity(high, 'B')})")


if __name__ == "__main__":
    main()
