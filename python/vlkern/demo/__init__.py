"""The demo: a small SigLIP learns from 2000 drawings and their captions, then answers searches."""
