"""Estimates for a plan on a cluster: memory, traffic, step time, layouts that fit, and losses through failures.

hardware     what devices and links can do, from YAML      measure   the same of this machine, measured
products     a product's time by its shape                 attention share of its rate that attention reaches
fused        operations as a compiler joins them           loading   samples that have to be ready in time
work         what a model does, counted op by op           memory    bytes of a process by cause
traffic      bytes over links by cause                     events    a discrete-event simulator
activities   one optimizer step in the simulator's terms   step      its time, by cause
report       all of it for one stage of a plan             search    layouts that fit, ranked
failures     a long run: stragglers, lost nodes, checkpoints
"""
