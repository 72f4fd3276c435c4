"""One decoder family: its config covers Llama, Qwen, Mistral, Gemma and GPT-2 shapes.

`meshwright.models` is the door to it.
"""
