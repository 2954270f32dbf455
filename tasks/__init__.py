"""Task groups for width-pruned models, and a demo that needs no network.

The folder holds YAML files in the format of lm-evaluation-harness. The entry
point ``lm_eval.tasks`` names this package, so that the harness scans its folder
for task and group configurations; nothing has to be imported from here.
"""
