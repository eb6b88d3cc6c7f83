"""Quantizing a Hugging Face safetensors folder: reading it safely, choosing its layers, writing the new one."""
