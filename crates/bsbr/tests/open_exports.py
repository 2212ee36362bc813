"""Opens the checkpoints named on the command line with transformers: the configuration, which is strict about the types of
numbers, and where torch is installed the model with its weights.

For each it prints one line; the exit code is 1 if one does not open."""

import sys

from transformers import AutoConfig
from transformers.utils import is_torch_available, logging

logging.set_verbosity_error()
logging.disable_progress_bar()


def opened(path):
    config = AutoConfig.from_pretrained(path, local_files_only=True)
    told = [type(config).__name__]
    if is_torch_available():
        from transformers import AutoModelForCausalLM

        model, info = AutoModelForCausalLM.from_pretrained(path, local_files_only=True, output_loading_info=True)
        # Constants that checkpoints of older versions hold beside the weights.
        buffers = (".attn.masked_bias", ".attn.bias", ".rotary_emb.inv_freq")
        wrong = {key: [name for name in names if not str(name).endswith(buffers)] for key, names in info.items()}
        wrong = {key: names for key, names in wrong.items() if names}
        assert not wrong, wrong
        told.append(f"{model.num_parameters()} parameters")
    return ", ".join(told)


def main(paths):
    failed = False
    for path in paths:
        try:
            print(f"{path}: {opened(path)}")
        except Exception as error:
            failed = True
            print(f"{path}: {type(error).__name__}: {str(error)[:600]}")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
