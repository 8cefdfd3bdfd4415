"""How the toy weights are made, one file a model: `python -m wris_lib pretrain clip|sam|parser|t5|albef`."""
