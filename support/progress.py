"""Progress of a long phase: a bar on a terminal, else a line every ten seconds."""
import time

from tqdm import tqdm

from support import ranks


class Meter:
    """meter(done, total) shows how far a phase is. Of several ranks the first one speaks, of its
    own share."""

    def __init__(self, what):
        self.what = what
        self.begin = self.said = time.time()
        self.shown = ranks.RANK == 0
        self.bar = tqdm(desc=what, disable=None if self.shown else True, leave=False,
                        mininterval=0.5)

    def __call__(self, done, total):
        now = time.time()
        eta = (now - self.begin) / done * (total - done)
        self.bar.total = total
        self.bar.update(done - self.bar.n)
        if self.bar.disable and self.shown and now - self.said > 10 and done < total:
            print(f"    {done}/{total} {self.what}, eta {eta:.0f}s", flush=True)
            self.said = now
        if done == total:
            self.bar.close()
