"""Converts a made-up model with llama.cpp's own converter: to_gguf.py SOURCE MODEL ARGUMENT...

The converter knows pre-tokenizers by a hash of what they do and refuses others. How text is split
does not matter here, as prompts are token ids, so it is told one that it knows.
"""

import sys

source, *arguments = sys.argv[1:]
sys.path[:0] = [source, f"{source}/gguf-py"]

import conversion.base  # noqa: E402
import convert_hf_to_gguf  # noqa: E402

conversion.base.TextModel.get_vocab_base_pre = lambda *_: "llama-bpe"
sys.argv = ["convert_hf_to_gguf.py", *arguments]
convert_hf_to_gguf.main()
