"""Times calls as Tenon's benchmarks do (tests/bench/README.md): cold inputs, in
a CUDA graph, the median of its replays."""

import torch

REPLAYS = 21
WARM_UP = 3
MIN_CALLS = 8


def cache_bytes():
    size = torch.cuda.get_device_properties(0).L2_cache_size
    return min(max(size, 32e6), 256e6)


def num_sets(bytes_of_call):
    """Sets of inputs to rotate through, so that a call finds none in cache."""
    return int(min(max(2 * cache_bytes() / max(bytes_of_call, 1) + 1, 2), 64))


class Timer:
    def __init__(self):
        self._filler = torch.ones(
            int(3 * cache_bytes()) // 4, dtype=torch.int32, device="cuda"
        )

    def _empty_cache(self):
        self._filler.max()  # reads only

    def graph(self, sets, call):
        """Microseconds of call(i), i from 0 to sets - 1, in one graph."""
        calls = (MIN_CALLS // sets + 1) * sets if sets < MIN_CALLS else sets
        stream = torch.cuda.Stream()
        with torch.cuda.stream(stream):
            for i in range(sets):
                call(i)
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            for i in range(calls):
                call(i % sets)
        return self._median(graph.replay) / calls

    def eager(self, sets, call):
        """The same without a graph, one call at a time: for what waits for the
        device in its middle."""
        for i in range(sets):
            call(i)
        turn = iter(range(1 << 30))
        return self._median(lambda: call(next(turn) % sets))

    def _median(self, run):
        times = []
        for repeat in range(WARM_UP + REPLAYS):
            begin = torch.cuda.Event(enable_timing=True)
            end = torch.cuda.Event(enable_timing=True)
            self._empty_cache()
            begin.record()
            run()
            end.record()
            end.synchronize()
            if repeat >= WARM_UP:
                times.append(begin.elapsed_time(end) * 1e3)
        return sorted(times)[len(times) // 2]
