"""Shards to model: the second half of Cria's journey. The command is `pretrain`.

The rooms, in groups; in brackets what the field calls a thing where it has another word for it. `tests/test_layers.py` holds
which may import which.

Start: from a command to a run that can take its next step.
    __main__      which command; only the one that is asked for is imported
    cli           errors in one line, status 2
    imports       torch, imported with the garbage collector off
    streams       standard output and error that nobody reads, or that a full disk takes
    config        defaults < YAML < command line; what depends on several sections is checked
    config_file   a YAML file, read so that what it says is what is run
    sections      every key, its default and its unit
    preparation   how a run begins or goes on; all that can be wrong is found here (setup)
    run           what a run is made of, and how far it is (training state)
    run_folder    RUN_DIR: one job has it; config.yaml and what an export needs
    lock          one job at a time in a folder
    folder        a folder that is whole under its name, or is not there (atomic write)
    scheduler     signals, the end of the job's time, exit statuses, restarts (preemption)
    versions      what measured figures and exact bits depend on

Data: which sequences make up a step, and whose they are.
    mixture       the order: step -> sequences, a pure function (sampler, data mixing)
    permutation   a keyed permutation of any length (shuffle)
    slots         which of a step's slots are a rank's (data-parallel split)
    data          datasets opened and checked; micro-batches read ahead (loader)
    left_out      steps that are not trained, by train.leave_out (skipped data)
    validation    the loss on data that is not trained on

Model: what computes the loss.
    model         the Llama family
    ops           the operations in plain PyTorch, the reference
    kernels       the same operations by other libraries
    backends      which library computes which operation, and why (with kernels: operator dispatch)
    float8        linear layers in fp8
    parallel      device, precision, compilation, recomputation, through Fabric
    sharding      where parameters, gradients and optimizer state lie (FSDP, ZeRO, HSDP)
    hf            Hugging Face folders, written and read
    hf_config     config.json and `ModelConfig`, each from the other

Step: the loop.
    trainer       the optimizer step, and the loop around it
    optim         AdamW, the schedule, clipping
    skips         updates that are skipped, and when there are too many (outlier and NaN skipping)
    leaving       how training saves, and how it ends

Saves and resume.
    saver         writes checkpoints while training goes on (asynchronous checkpointing)
    synced        how their files come to the disk (fsync)
    checkpoint    what they are made of; found, verified, loaded
    index         DCP's index, a pickle, read safely
    reading       JSON that may be torn or of another version
    soundness     whether all is finite and replicas are alike, before a save (NaN and replica check)
    retention     which checkpoints stay (pruning)
    disk          what checkpoints take on the disk
    going_on      what a run goes on from (resume)
    back          back.json: the run was sent back to an earlier checkpoint (rollback)
    init_from     a new run's first weights (continual pretraining)
    snapshot      the weights that an export is made of, of one checkpoint or the mean of several (weight averaging)

Several ranks.
    ranks         how they agree (collectives on the host)
    joining       how they meet (rendezvous)
    hosts         this host's name, and which host is to blame

Watching: who is slow, who hangs, who failed first.
    watchdog      where a rank is, said to its watcher (heartbeat)
    watcher       the process beside each rank
    hub           rank 0's watcher: hears of all, and ends all (with watchdog, watcher and stuck: hang detection)
    collectives   a rank's collectives that have not come back (flight recorder)
    stuck         whom the ranks wait for in a collective
    crash         who was first; crash-report.txt (root cause)
    pace          what each rank's own work takes (stragglers)
    processes     what Linux tells of other processes, and their stacks

Log and report.
    metrics       tokens/s, MFU, memory; metrics.jsonl
    loggers       TensorBoard, Weights & Biases
    logbook       what is written of a run, and when
    progress      the bar, or a line a record
    history       metrics.jsonl read back
    several       runs to be laid side by side
    pictures      pictures of one run
    overlay       pictures of several runs
    page          the HTML page

Plan: what a run needs.
    chips         datasheets
    memory        bytes on a GPU
    speed         seconds of a step
    published     published runs, the evidence
    probe         a calibration on this machine
    choice        all layouts, and the best (search)
    answer        how a plan is worded

Bench: how fast it is.
    bench_step    times the real step
    bench_timing  how a step is timed, for ours and for peers alike
    bench_profile where its time goes (profiler)
    bench_rows    a row in a process of its own
    bench_sweep   the fastest settings (autotuning)
    bench_peers   the same model by other trainers' code
    peer          one of them
    bench_paper   TinyLlama's table
    bench_result  the figures, and the comparison with earlier ones (regression check)

Commands, each with `main`; none imports another.
    train         pretrain train
    verify_resume pretrain verify-resume: a stopped run is the same run
    benchmark     pretrain bench
    plan          pretrain plan
    doctor        pretrain doctor: the machines, before the run (node health check)
    checkup       what the doctor's measurements mean
    devices       what the doctor finds of a device
    order         pretrain order: a step's sequences and documents
    report        pretrain report: pictures and a page
    export        pretrain export: to Hugging Face
    generate      pretrain generate: text from an exported model
"""

__version__ = "0.1.0"
