"""Entry point for Ray jobs: `ray job submit -- python launch/ray_job.py --config config.yaml [key=value ...]`.

Runs all stages on the cluster; takes the arguments of `launch/train.py`.
"""

from harness.cluster.job import main

if __name__ == "__main__":
    main()
