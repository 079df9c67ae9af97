"""Runs on a Ray cluster: the stages of a run as actors that are placed together, watched, and started again.

Ray is imported inside functions only, so that everything else works without it.
"""
