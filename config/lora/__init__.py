"""Configuration of the LoRA gradient bridge, examples/lora_ladder.py."""
