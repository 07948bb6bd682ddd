"""Kill anything, any time, any way; run the same command again; get the same model: ``python -m tests.chaos``.

A campaign is one run that is started, attacked and started again until an undisturbed start finishes it. What comes out is
compared with an uninterrupted run: bit for bit if all starts had the same number of processes, to 1e-10 otherwise (float64).
In between are looked at: that every process has gone within a bounded time, that every checkpoint with a final name is
whole, and that each start goes on from the newest whole one. Whether a checkpoint is whole is judged here anew, with hashlib.

    python -m tests.chaos --kills 100 --seed 0 --table chaos.md
    python -m tests.chaos --only power --kills 20
    python -m tests.chaos --campaign 17         one of the same seed again, with its folder kept

Most starts are forks of a process that has imported torch (the nursery): a start takes 0.2 s rather than 5 s. Some are real:
``lockstep train`` and ``accelerate launch``.
"""
