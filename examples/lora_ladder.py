"""How much of a full-gradient reconstruction survives LoRA: rank by rank and phase by phase, one command.

python examples/lora_ladder.py out=examples/results/lora/conv
python examples/lora_ladder.py model=vit_tokens ranks=[4,16,full] out=outputs/lora_vit
python examples/lora_ladder.py model=vit phases=[0] out=examples/results/lora/vit

A finished cell is on disk before the next one begins: the same command again goes on where it stopped. All keys:
config/lora/ladder.yaml; what the phases mean and what was measured: docs/lora.md.
"""

from breaching_ext.lora.cli import main

if __name__ == "__main__":
    main()
