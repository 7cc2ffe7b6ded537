"""Fine-tuning methods: one file each, one class each; `request.py` lists them in its union."""
