"""Simulated processes that each have a share of a loss."""

import threading


class Ranks:
    """Two processes, simulated by two threads of which one computes at a time.

    ``reduce`` is as strict as an all-reduce: all must call it, with the same shape and dtype.
    """

    def __init__(self):
        self.turn = threading.Lock()
        self.meeting = threading.Barrier(2, timeout=30)
        self.brought = [None, None]

    def reducer(self, rank):
        def reduce(tensor):
            self.brought[rank] = tensor.clone()
            self.turn.release()  # global flags, as the attention kernel's, are set under the lock
            try:
                self.meeting.wait()
                mine, other = self.brought
                assert (mine.dtype, mine.shape) == (other.dtype, other.shape)
                total = mine + other
                self.meeting.wait()
            finally:
                self.turn.acquire()
            return total

        return reduce

    def run(self, work):
        """Run ``work(rank, reduce)`` on both; return what each returned or raised."""
        outcomes = [None, None]

        def task(rank):
            with self.turn:
                try:
                    outcomes[rank] = work(rank, self.reducer(rank))
                except Exception as error:
                    outcomes[rank] = error

        threads = [threading.Thread(target=task, args=(rank,)) for rank in (0, 1)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        return outcomes
