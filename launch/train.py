"""Entry point for the DeepSpeed launcher: `deepspeed launch/train.py --config config.yaml [key=value ...]`.

Runs calibrate → init → prepare → train → export on every rank that the launcher starts.
"""

from harness.gang import main

if __name__ == "__main__":
    main()
