"""Results in the files of other programs: new words, LoRA, whole pipelines, a model card."""
