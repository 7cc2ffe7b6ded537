import logging

from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments

from profiler.callback import MemoryPreflight

logging.basicConfig(level="INFO")
model = LlamaForCausalLM(LlamaConfig(vocab_size=1000, hidden_size=64, intermediate_size=128))
data = [{"input_ids": [1] * 32, "labels": [1] * 32}] * 16
args = TrainingArguments(output_dir="out", max_steps=3, report_to=[], save_strategy="no")
preflight = MemoryPreflight(on_misfit="stop", record_to="records.jsonl")
Trainer(model=model, args=args, train_dataset=data, callbacks=[preflight]).train()
