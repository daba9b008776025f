"""The parts of ``python -m zm_mlx.chat``: a conversation, its file, its commands, and how turns are typed."""
