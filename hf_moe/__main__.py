"""`python -m hf_moe` is `hf-moe`, for launchers that want a module: `accelerate launch -m hf_moe train …`."""

from hf_moe.cli import main

if __name__ == "__main__":
    main()
