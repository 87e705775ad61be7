"""The works, by name; the order is that of the table."""

from sparsemix.bench import ceilings
from sparsemix.bench.work import Work
from sparsemix.bench.works import decoding, depth, main_job, moe, peer, rows, scaling, tables, ternary, topk

WORKS = {
    work.name: work
    for work in (
        Work("ceilings", "what this machine can do at most", ceilings.cases),
        *peer.WORKS,
        *topk.WORKS,
        *moe.WORKS,
        *depth.WORKS,
        *ternary.WORKS,
        *decoding.WORKS,
        *rows.WORKS,
        *tables.WORKS,
        *scaling.WORKS,
        *main_job.WORKS,
    )
}
