"""The guards that :mod:`tests.mutations` switches off, and the tests that must miss them."""

from __future__ import annotations

from tests.mutations import Guard

ISOLATION = "tests/integration/test_isolation.py"
ZOO = "tests/integration/test_zoo.py"
BAD_CALLS = "tests/bad_input/test_calls.py"
BAD_RUNS = "tests/bad_input/test_runs.py"
FAULTS = "tests/integration/test_faults.py"
OBJECTIVE = "tests/geometry/test_objective.py"
WEIGHTS = "tests/geometry/test_weights.py"
GRAPHS = "tests/geometry/test_memory.py"
KERNELS = "tests/geometry/test_kernels.py"
SECONDS = "tests/geometry/test_second_derivatives.py"
REPORT = "tests/test_report.py"
COMPARISON = "tests/test_comparison.py"
COMPARISON_FIGURES = "tests/test_comparison_figures.py"
CLIENTS = "tests/training/test_loggers.py"
RESUME = "tests/integration/test_resume.py"
SAFETY = "tests/test_safety.py"
BAD_LOGGERS = "tests/training/test_failing_loggers.py"
MEASURING = "tests/callbacks/test_measuring.py"
SCHEDULE = "tests/training/test_schedule.py"
IDLE = "tests/training/test_hooks.py"
JOINING = "tests/training/test_joining.py"
INTERPOLATION = "tests/callbacks/test_interpolation.py"
SAVINGS = "tests/geometry/test_eigen_savings.py"
OPTIONS = "tests/callbacks/test_options.py"
GAP = "tests/callbacks/test_generalization.py"
GAP_OF_TWO = "tests/integration/test_generalization_of_two.py"
MEASURED = "tests/test_measure.py"
EQUAL = f"{ISOLATION} -k bitwise_equal"

STATE = "training/module_state.py"
RANDOM = "training/random_state.py"
ISOLATED = "training/isolation.py"
SESSION = "training/session.py"
ACCOUNT = "training/account.py"
PUBLISHER = "training/publisher.py"
HOOKS = "training/hooks.py"
HESSIAN = "callbacks/hessian.py"
EDGE_RATIO = "geometry/edge_ratio.py"
LANDSCAPE = "callbacks/landscape.py"
GENERALIZATION = "callbacks/generalization.py"
FAULTY = "training/faults.py"
ROUND = "training/round.py"
LOSSES = "training/losses.py"
PROBE = "training/probe.py"
PROBES = "training/probes.py"
PROCESSES = "training/processes.py"
SHARDING = "training/sharding.py"
PAGE = "report/page.py"
FRAME = "report/frame.py"
CHARTS = "report/charts.py"
HISTORY = "training/history.py"
READING = "report/run.py"
COMPARISON_PAGE = "compare/page.py"
COMPARISON_PICTURES = "compare/pictures.py"
COMPARISON_TABLE = "compare/table.py"
COMPARED_RUNS = "compare/runs.py"
CURVES = "figures/curves.py"
FILMSTRIP = "figures/filmstrip.py"
PAIRWISE = "figures/comparison.py"
RECORDS = "training/records.py"
LOGGERS = "training/loggers.py"
PUBLISHER = "training/publisher.py"
LOSS = "geometry/objective.py"
BATCHES = "geometry/batches.py"
REDUCTION = "geometry/reduction.py"
MEMORY = "geometry/memory.py"
MEANS = "training/means.py"
OFFLINE = "measure/offline.py"
SAVED = "measure/checkpoint.py"
PLAIN = "geometry/kernels.py"
OPERATION = "geometry/operation.py"
NORMS = "geometry/normalization.py"


GUARDS = [
    # -- random numbers
    Guard("Python's random state", RANDOM, "random.setstate(self._python)", "pass", EQUAL),
    Guard("NumPy's random state", RANDOM, "np.random.set_state(self._numpy)", "pass", EQUAL),
    Guard("torch's random state", RANDOM, "torch.set_rng_state(self._torch)", "pass", EQUAL),
    Guard(
        "the same random numbers in every evaluation",
        ISOLATED,
        "seed_everything(self._seed + index)",
        "pass",
        f"{ISOLATION} -k values_repeat",
    ),
    # -- the module
    Guard(
        "what outlives an evaluation",
        ISOLATED,
        "isolation.restore()",
        "pass",
        EQUAL,
        within="isolated",
    ),
    Guard(
        "parameters that training_step edits",
        STATE,
        "_overwrite(parameter, content)",
        "pass",
        f"{ZOO} -k prototypes",
        within="ModuleState._restore",
    ),
    Guard(
        "requires_grad",
        STATE,
        "parameter.requires_grad_(requires_grad)",
        "pass",
        f"{ISOLATION} -k its_own",
    ),
    Guard(
        "gradients in flight",
        STATE,
        "parameter.grad = gradient",
        "pass",
        f"{ISOLATION} -k gradients_in_flight",
        within="ModuleState._restore",
    ),
    Guard(
        "gradients that the loss itself makes",
        STATE,
        "parameter.grad = None",
        "pass",
        f"{ISOLATION} -k its_own",
        within="ModuleState.__init__",
    ),
    Guard(
        "copies of buffers for each evaluation",
        STATE,
        "holder[key] = copies[id(tensor)]",
        "pass",
        f"{ISOLATION} -k values_repeat",
        within="ModuleState.begin_evaluation",
    ),
    Guard(
        "attributes",
        STATE,
        "m.__dict__.update(attributes)",
        "pass",
        EQUAL,
        within="ModuleState.end_evaluation",
    ),
    Guard(
        "attributes that were not there before",
        STATE,
        "del m.__dict__[added]",
        "pass",
        f"{ISOLATION} -k its_own",
        within="ModuleState.end_evaluation",
    ),
    Guard("containers", STATE, "restore()", "pass", EQUAL, within="ModuleState.end_evaluation"),
    Guard(
        "tensors in containers",
        STATE,
        "_overwrite(tensor, content)",
        "pass",
        f"{ZOO} -k deep",
        within="ModuleState.end_evaluation",
    ),
    Guard(
        "teachers that the loss moves",
        STATE,
        "for parameter, content in self._moved:\n            _overwrite(parameter, content)",
        "pass",
        f"{ZOO} -k teacher",
        within="ModuleState.end_evaluation",
    ),
    Guard(
        "train and eval flags",
        STATE,
        "self.set_mode(None)",
        "pass",
        EQUAL,
        within="ModuleState._restore",
    ),
    Guard(
        "torch generators",
        STATE,
        "generator.set_state(state)",
        "pass",
        EQUAL,
    ),
    Guard(
        "NumPy generators",
        STATE,
        'lambda: setattr(value.bit_generator, "state", bits)',
        "lambda: None",
        EQUAL,
    ),
    Guard(
        "Python generators",
        STATE,
        "lambda: value.setstate(words)",
        "lambda: None",
        f"{ZOO} -k noise",
    ),
    Guard(
        "a restore that Ctrl-C cuts short",
        STATE,
        "            self._restore()\n            raise",
        "            raise",
        f"{FAULTS} -k interrupt",
    ),
    # -- what is logged
    Guard(
        "results of self.log",
        ISOLATED,
        "loop._results = type(results)(training=results.training)",
        "pass",
        EQUAL,
        within="_silenced",
    ),
    Guard(
        "loggers",
        ISOLATED,
        "trainer.loggers = [DummyLogger()] if loggers else []",
        "pass",
        f"{ZOO} -k hand",
    ),
    Guard(
        "the name of the hook that logs",
        ISOLATED,
        'pl_module._current_fx_name = "training_step"',
        "pass",
        EQUAL,
    ),
    # -- the probe
    Guard(
        "a fresh batch for each evaluation",
        LOSSES,
        "fresh = partial(clone_batch, held.batch)",
        "fresh = lambda: held.batch",
        f"{ISOLATION} -k values_repeat",
    ),
    Guard(
        "a probe that training cannot edit",
        PROBE,
        "cls(clone_batch(batch), index",
        "cls(batch, index",
        f"{ZOO} -k edited",
    ),
    Guard(
        "the Trainer's precision",
        LOSSES,
        "trainer.precision_plugin.train_step_context()",
        "__import__('contextlib').nullcontext()",
        "tests/callbacks/test_options.py -k trainers_precision",
    ),
    Guard(
        "batches without a loss",
        SESSION,
        "if pl_module.automatic_optimization and not outputs:",
        "if False:",
        f"{MEASURING} -k without_a_loss",
    ),
    # -- when
    Guard(
        "batches that did not step",
        SESSION,
        "if trainer.global_step == self._stepped:",
        "if False:",
        MEASURING,
        within="Session.on_train_batch_end",
    ),
    # -- the budget
    Guard(
        "idle steps do nothing",
        SESSION,
        "step >= self._wanted_at",
        "True",
        f"{SCHEDULE} -k nothing_is_due",
        within="Session._idle",
    ),
    Guard(
        "what idle hooks cost is charged",
        SESSION,
        "self.account.budget.charge(",
        "abs(",
        f"{SCHEDULE} -k idle_hooks_are_charged",
        within="Session._count_batches",
    ),
    Guard(
        "no convergence is claimed of a random start too soon",
        "geometry/eigen.py",
        "converged = converged and space.products >= fewest",
        "pass",
        "tests/geometry/test_eigen.py -k random_start_has_not",
    ),
    Guard(
        "values borrow no more than the run will earn",
        HESSIAN,
        "int(min(self.max_hvps, max(most, self.k + 1)))",
        "self.max_hvps",
        f"{SCHEDULE} -k what_the_run_can_pay_for",
    ),
    Guard(
        "what the run pays for is for all eigenvalue problems together",
        HESSIAN,
        "(this_round.affordable(price) - others) / problems",
        "this_round.affordable(price)",
        f"{SCHEDULE} -k shared_by_all",
    ),
    Guard(
        "a probe is no larger than the run can pay for",
        PROBES,
        "if not trainer.strategy.broadcast(dear):",
        "if True:",
        f"{SCHEDULE} -k no_larger_than",
    ),
    Guard(
        "an exact schedule keeps its whole probe",
        PROBES,
        "if any(m.max_overhead is None for m in monitors):",
        "if False:",
        f"{SCHEDULE} -k no_larger_than",
    ),
    Guard(
        "no picture is begun that cannot be paid",
        ACCOUNT,
        "monitor.draws and self.budget.affords(cost + self.of(monitor))",
        "monitor.draws",
        f"{SCHEDULE} -k cannot_pay",
    ),
    Guard(
        "the last picture fits what is left",
        ACCOUNT,
        "if monitor.max_overhead is None or self.of(monitor) <= left:",
        "if True:",
        f"{SCHEDULE} -k as_fine_as",
    ),
    Guard(
        "a picture beside values waits until it is affordable",
        PUBLISHER,
        "if final or self._account.spares(piece.drawings):",
        "if True:",
        f"{SCHEDULE} -k beside_values_waits",
    ),
    Guard(
        "what was put off comes out of what the last pictures may take",
        SESSION,
        "if monitor.draws:  # before what is left is shared out",
        "if False:",
        f"{SCHEDULE} -k leaves_what",
    ),
    Guard(
        "dear pictures of the whole run are left out",
        SESSION,
        "self.account.affords(piece.drawings)",
        "True",
        f"{SCHEDULE} -k is_left_out",
    ),
    Guard(
        "a coarser slice is not the film's grid",
        LANDSCAPE,
        'if "coarse" in slice.metadata:',
        "if False:",
        "tests/callbacks/test_whole_run.py -k spoil",
    ),
    Guard(
        "a subclass's own hooks are called",
        HOOKS,
        "if getattr(type(callback), name) is getattr(idle, name):",
        "if True:",
        f"{IDLE} -k subclass",
    ),
    Guard(
        "three faults in a row end it",
        FAULTY,
        "disabled = monitor.faults >= _FAULTS_ALLOWED",
        "disabled = False",
        FAULTS,
    ),
    # -- derivatives
    Guard(
        "weights copied back after a displacement",
        "geometry/weights.py",
        "torch._foreach_copy_(live, base)",
        "pass",
        WEIGHTS,
        within="Weights.displaceable",
    ),
    Guard(
        "graphs of other weights",
        LOSS,
        "self._loss = self._gradient = None\n            self._local.forget()",
        "pass",
        WEIGHTS,
        within="Objective._begin",
    ),
    Guard(
        "no loss of one point lies in the memory of the next",
        BATCHES,
        "place.copy_(self._value(fn) if alone else self.loss()[0])",
        "self.known_loss = self._value(fn)\n            place.copy_(self.known_loss)",
        f"{OBJECTIVE} -k no_loss_of_one_point",
    ),
    Guard(
        "functions that are differentiable once",
        BATCHES,
        "if create_graph and once_differentiable_in",
        "if False and once_differentiable_in",
        "tests/geometry/test_engines.py",
    ),
    Guard(
        "losses that differentiate inside",
        BATCHES,
        "self.forward_needs_grad = True",
        "raise",
        f"{OBJECTIVE} -k penalty",
    ),
    Guard(
        "sparse gradients",
        BATCHES,
        "t.to_dense() if t.is_sparse else t",
        "t",
        WEIGHTS,
    ),
    Guard(
        "the parts of complex weights, stepped like two real ones",
        "geometry/stability.py",
        "{k: real(v) if isinstance(v, Tensor) else v for k, v in state.items()}",
        "dict(state)",
        "tests/geometry/test_complex.py -k adam",
    ),
    Guard(
        "weights compared bit for bit, complex ones too",
        "geometry/weights.py",
        "numbers = real(p.detach())",
        "numbers = torch.view_as_real(p.detach())[..., 0] if p.is_complex() else p.detach()",
        "tests/geometry/test_complex.py -k known_to_be_others",
    ),
    Guard(
        "attention in plain operations",
        PLAIN,
        "stack.enter_context(torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH))",
        "pass",
        KERNELS,
        within="plain_kernels",
    ),
    Guard(
        "no inference path in transformer layers",
        PLAIN,
        "mha.set_fastpath_enabled(False)",
        "pass",
        f"{OBJECTIVE} -k fast_path",
        within="plain_kernels",
    ),
    Guard(
        "weight norm in plain operations",
        PLAIN,
        'exchange(stack, place, "_weight_norm", _weight_norm)',
        "pass",
        f"{OBJECTIVE} -k weight_norm",
        within="plain_kernels",
    ),
    Guard(
        "checkpoints that do not re-enter autograd",
        PLAIN,
        'exchange(stack, checkpointing, "CheckpointFunction", _Checkpoint)',
        "pass",
        KERNELS,
        within="plain_kernels",
    ),
    Guard(
        "compiled functions run eagerly",
        PLAIN,
        'torch.compiler.set_stance("force_eager")',
        "contextlib.nullcontext()",
        f"{ZOO} -k compiled",
    ),
    Guard(
        "the precision that autocast computes in",
        BATCHES,
        "saved_dtypes(self._pieces[0][1]) |",
        "",
        KERNELS,
        within="Batches.difference_step",
    ),
    # -- float32 with fewer bits, and what a user's settings are not to touch
    Guard(
        "losses in full float32",
        BATCHES,
        "plain_kernels(self.cudnn), full_float32():",
        "plain_kernels(self.cudnn):",
        f"{KERNELS} -k as_precise",
        within="Batches._plain_kernels",
    ),
    Guard(
        "gradients that are subtracted in full float32",
        BATCHES,
        "stack.enter_context(full_float32())  # finite differences are made of such",
        "pass",
        f"{KERNELS} -k as_precise",
    ),
    Guard(
        "no loss of less than full float32",
        BATCHES,
        "loss if float32_is_full() else None",
        "loss",
        f"{KERNELS} -k known_loss",
    ),
    Guard(
        "the older switches of float32's precision",
        PLAIN,
        "torch.backends.cudnn.allow_tf32 = False",
        "pass",
        f"{KERNELS} -k and_back",
        within="full_float32",
    ),
    Guard(
        "cuDNN's own random numbers are not drawn",
        PLAIN,
        "if not (dropout > 0.0 and train and args[0].is_cuda):",
        "if True:",
        f"{KERNELS} -k own_random",
        within="_without_hidden_state.call",
    ),
    Guard(
        "random numbers are drawn on the CPU",
        "geometry/vectors.py",
        'dtype=torch.float32, device="cpu")',
        "dtype=torch.float32)",
        "tests/geometry/test_default_device.py -k Lanczos",
    ),
    # -- second derivatives that are written out
    Guard(
        "those of a loss are used",
        OPERATION,
        "and worth_while(inputs.x)",
        "and False",
        f"{SECONDS} -k writes_less",
        within="_Value.backward",
    ),
    Guard(
        "a gradient penalty's are torch's",
        OPERATION,
        "torch.is_grad_enabled() and ctx.inside_loss():",
        "False:",
        f"{SECONDS} -k inside_the_loss",
    ),
    Guard(
        "and do not run through the gradient that arrives",
        OPERATION,
        "x.view_as(x) for x",
        "x for x",
        f"{SECONDS} -k inside_the_loss",
    ),
    Guard(
        "the statistics depend on the data",
        NORMS,
        "mean = x.mean(inside, keepdim=True)",
        "mean = x.mean(inside, keepdim=True).detach()",
        f"{SECONDS} -k inside_the_loss",
    ),
    Guard(
        "a checkpoint's second evaluation is like its first",
        BATCHES,
        "refusing_double_backward(), self._twice_differentiable():",
        "refusing_double_backward(), plain_kernels(self.cudnn):",
        f"{SECONDS} -k checkpoint",
    ),
    Guard(
        "somebody's own Hessian is not passed over",
        "geometry/objective.py",
        'if getattr(self.hvp, "__func__", None) is not Objective.hvp:',
        "if False:",
        "tests/geometry/test_products.py -k somebody",
    ),
    Guard(
        "kernels come back as soon as they do not serve",
        "geometry/objective.py",
        "stack.close()",
        "pass",
        "tests/geometry/test_products.py -k take_over",
        within="Objective.products.product",
    ),
    Guard(
        "products at new weights are on a new graph",
        "geometry/objective.py",
        "self._begin()",
        "pass",
        "tests/geometry/test_products.py -k moved",
        within="Objective.products",
    ),
    Guard(
        "kernels come back when the products are made",
        BATCHES,
        "self._held = None",
        "pass",
        "tests/geometry/test_products.py -k fault",
        within="Batches.products",
    ),
    Guard(
        "no third derivative of what was written out",
        OPERATION,
        "if torch.is_grad_enabled():",
        "if False:",
        f"{SECONDS} -k third",
        within="_Gradient.backward",
    ),
    Guard(
        "autocast is torch's to do",
        OPERATION,
        "and not torch.is_autocast_enabled(first.device.type)",
        "",
        f"{SECONDS} -k stands_for",
        within="serves",
    ),
    Guard(
        "torch.func is torch's to do",
        OPERATION,
        "and not torch._C._are_functorch_transforms_active()",
        "",
        f"{SECONDS} -k torch_func",
        within="serves",
    ),
    Guard(
        "forward mode is torch's to do",
        OPERATION,
        "and forward_ad._current_level < 0",
        "",
        f"{SECONDS} -k stands_for",
        within="serves",
    ),
    # -- memory
    Guard(
        "graphs within the examples allowed",
        BATCHES,
        "> allowed:",
        "> 1e9:",
        GRAPHS,
        within="Batches._arrange",
    ),
    Guard(
        "more graphs only where memory is known to hold them",
        MEMORY,
        "if free is None or self.bytes_per_example is None:",
        "if free is None:\n            return True\n        if self.bytes_per_example is None:",
        GRAPHS,
    ),
    Guard(
        "the gradients of kept graphs count",
        MEMORY,
        "+ graphs * self.bytes_per_graph",
        "",
        GRAPHS,
    ),
    Guard(
        "a share of the free memory",
        MEMORY,
        "<= self.share * free",
        "<= free",
        GRAPHS,
    ),
    Guard(
        "pieces that give the whole loss",
        BATCHES,
        "abs(found - expected) <= _SAME_LOSS * abs(expected)",
        "True",
        GRAPHS,
    ),
    Guard(
        "what an out of memory's frames hold",
        LOSS,
        "let_go(error)  # what is kept goes, what its frames hold too",
        "pass",
        GRAPHS,
        within="Objective._until_it_fits",
    ),
    Guard(
        "the CPU's way to be out of memory",
        "geometry/faults.py",
        """_FULL = ("can't allocate memory", """,
        "_FULL = (",
        GRAPHS,
    ),
    Guard(
        "processes that go smaller together",
        REDUCTION,
        'return "starved" if out_of_memory(fault) else "failed"',
        'return "failed"',
        GRAPHS,
    ),
    Guard(
        "one graph in work at a time",
        BATCHES,
        "del graph  # before the next one is built",
        "self._last = graph",
        GRAPHS,
        within="Batches.product",
    ),
    Guard(
        "products before displacements",
        SESSION,
        "(monitor.draws, monitor.displaces)",
        "monitor.draws",
        "tests/integration/test_memory.py -k twice",
    ),
    Guard(
        "batches that know themselves how they belong together",
        PROBE,
        "_map_tensors(held.batch, partial(piece, s), _refuse)",
        "_map_tensors(held.batch, partial(piece, s))",
        "tests/training/test_probe.py",
    ),
    # -- several processes
    Guard(
        "a reduction that carries a fault",
        REDUCTION,
        "except Exception as error:  # every process must reach the reduction below",
        "except ZeroDivisionError as error:",
        "tests/geometry/test_reduction.py",
        within="Reduction.mean",
    ),
    Guard(
        "processes that meet before they exchange",
        PROCESSES,
        "self.meet(size=total.numel())",
        "pass",
        "tests/integration/test_faults_of_one.py",
        within="Processes.sum",
    ),
    Guard(
        "no warm start from before a fault",
        FAULTY,
        "monitor.forget()",
        "pass",
        "tests/integration/test_faults_of_one.py",
        within="count_fault",
    ),
    # -- loggers
    Guard(
        "a label of Lightning's, not a step of W&B's own",
        LOGGERS,
        "logger.log_image(tag, [image], step=step)",
        "logger.log_image(tag, [image])",
        f"{CLIENTS} -k wandb",
    ),
    Guard(
        "the step of MLflow's images",
        LOGGERS,
        "key=key, step=step",
        "key=key",
        f"{CLIENTS} -k mlflow",
    ),
    Guard(
        "names that MLflow takes",
        LOGGERS,
        'return re.sub(r"[^a-zA-Z0-9_/. -]+", "", name)',
        "return name",
        f"{CLIENTS} -k mlflow",
    ),
    Guard(
        "a subclass is the logger that it inherits from",
        LOGGERS,
        "in type(logger).__mro__",
        "in type(logger).__mro__[:1]",
        f"{CLIENTS} -k comet",
    ),
    Guard(
        "a logger that only pretends to take images",
        LOGGERS,
        '_NOTHING = ("DummyLogger",)',
        "_NOTHING = ()",
        f"{CLIENTS} -k dummy",
    ),
    Guard(
        "one folder for each run",
        LOGGERS,
        "(name, version) if p)",
        "(name, version) if False)",
        f"{CLIENTS} -k wandb",
    ),
    Guard(
        "a folder of a run that leads out of its save directory",
        LOGGERS,
        "if not Path(os.path.abspath(path)).is_relative_to(os.path.abspath(save_dir)):",
        "if False:",
        f"{BAD_LOGGERS} -k stay",
        within="_inside",
    ),
    Guard(
        "a save directory of another machine",
        LOGGERS,
        'Path(path) if scheme in ("file", "local") else None',
        "Path(place)",
        f"{BAD_LOGGERS} -k this_machine",
    ),
    Guard(
        "each failing logger is told of once",
        RECORDS,
        'whose=f"logger {index}"',
        'whose=f"{action} {index}"',
        f"{BAD_LOGGERS} -k two_good",
    ),
    Guard(
        "a logger that writes into an image spoils it for no other",
        RECORDS,
        "image.copy()",
        "image",
        f"{BAD_LOGGERS} -k two_good",
    ),
    Guard(
        "a logger that draws random numbers",
        PUBLISHER,
        "    @undrawn()  #",
        "    #",
        f"{BAD_LOGGERS} -k Meddles",
    ),
    Guard(
        "a prefix in a regular expression",
        RECORDS,
        "prefix = re.escape(prefix_of(logger))",
        "prefix = prefix_of(logger)",
        f"{CLIENTS} -k prefix",
    ),
    # -- the report
    Guard(
        "facts are escaped",
        PAGE,
        "{escape(_told(values))}",
        "{_told(values)}",
        f"{REPORT} -k escaped",
    ),
    Guard(
        "names of keys are escaped", PAGE, "<dt>{escape(key)}", "<dt>{key}", f"{REPORT} -k escaped"
    ),
    Guard("problems are escaped", PAGE, "{escape(problem)}", "{problem}", f"{REPORT} -k escaped"),
    Guard(
        "names of curves are escaped",
        CHARTS,
        'words = escape(f"{curve.name}, step {step}: {number(value, 4)}")',
        'words = f"{curve.name}, step {step}: {number(value, 4)}"',
        f"{REPORT} -k escaped",
    ),
    Guard(
        "nothing is fetched",
        FRAME,
        "default-src 'none';",
        "",
        f"{REPORT} -k outside",
        within="document",
    ),
    Guard(
        "few frames",
        READING,
        "in evenly(len(left), most)",
        "in range(len(left))",
        f"{REPORT} -k 24",
    ),
    Guard(
        "one scale for all frames",
        PAGE,
        "plane_figure(frame[0], scale=scale)",
        "plane_figure(frame[0], scale=ColorScale.from_slice(frame[0]))",
        f"{REPORT} -k scale",
    ),
    Guard(
        "a gap where a value is not finite",
        CHARTS,
        "lost.append(step)",
        "pass",
        f"{REPORT} -k finite",
        within="_curve",
    ),
    Guard(
        "a row needs a step",
        HISTORY,
        "not isinstance(row, dict) or not _is_step",
        "not isinstance(row, dict) or False and not _is_step",
        f"{REPORT} -k damaged_lines",
    ),
    Guard(
        "facts that change are curves",
        READING,
        "len(set(map(repr, values.values()))) > 1",
        "False",
        f"{REPORT} -k any_scalar",
    ),
    # -- comparisons
    Guard(
        "names of runs are escaped",
        COMPARISON_PAGE,
        '<th scope="row">{escape(name)}</th>',
        '<th scope="row">{name}</th>',
        f"{COMPARISON} -k escaped",
    ),
    Guard(
        "keys of a comparison are escaped",
        COMPARISON_PAGE,
        'colspan="2">{escape(key)}</th>',
        'colspan="2">{key}</th>',
        f"{COMPARISON} -k escaped",
    ),
    Guard(
        "notes are escaped",
        COMPARISON_PAGE,
        "{escape(note)}",
        "{note}",
        f"{COMPARISON} -k escaped",
    ),
    Guard(
        "directories are escaped",
        COMPARISON_PAGE,
        "{escape(str(folder))}",
        "{folder}",
        f"{COMPARISON} -k escaped",
    ),
    Guard(
        "groups are escaped",
        COMPARISON_PAGE,
        "{escape(comparison.groups.get(name, ''))}",
        "{comparison.groups.get(name, '')}",
        f"{COMPARISON} -k escaped",
    ),
    Guard(
        "names of pictures are escaped",
        COMPARISON_PAGE,
        "<h3>{escape(name)}</h3>",
        "<h3>{name}</h3>",
        f"{COMPARISON} -k escaped",
    ),
    Guard(
        "a value that is not finite enters no extreme",
        COMPARISON_TABLE,
        "for step, value in points if math.isfinite(value)]",
        "for step, value in points]",
        f"{COMPARISON} -k by_hand",
    ),
    Guard(
        "a seed that blew up enters no median",
        COMPARISON_TABLE,
        "for reading in readings if math.isfinite(reading.value)]",
        "for reading in readings]",
        f"{COMPARISON} -k by_hand",
    ),
    Guard(
        "one scale for all runs",
        COMPARISON_PICTURES,
        "filmstrip_figure(shown, scale=scale, names=names)",
        "filmstrip_figure(shown, scale=common_scale(shown[:1]), names=names)",
        f"{COMPARISON} -k share_one_colour_scale",
    ),
    Guard(
        "a run that blew up leaves the colours to the others",
        COMPARISON_PICTURES,
        "limit = min(limits[-1], _OUTLIER * limits[(len(limits) - 1) // 2])",
        "limit = limits[-1]",
        f"{COMPARISON} -k blown_up_plane",
    ),
    Guard(
        "runs have distinct names",
        COMPARED_RUNS,
        "while min(map(len, parts)) > 1 and len({one[-1] for one in parts}) == 1:",
        "while min(map(len, parts)) > 1:",
        f"{COMPARISON} -k short_and_distinct",
    ),
    Guard(
        "each run once",
        COMPARED_RUNS,
        "if count > 1:",
        "if False:",
        f"{COMPARISON} -k cannot_be_compared",
    ),
    Guard(
        "a slice on a grid of its own",
        FILMSTRIP,
        "_set_frame(axes, shown, ends)",
        "pass",
        f"{COMPARISON_FIGURES} -k different_grids",
        within="_draw",
    ),
    Guard(
        "a run that blew up leaves the axis to the others",
        CURVES,
        "bound = _OUTLIER * typical[(len(typical) - 1) // 2] if typical else 1.0",
        "bound = math.inf",
        f"{COMPARISON_FIGURES} -k blown_up",
    ),
    Guard(
        "no value beyond the last measurement of a seed",
        CURVES,
        "left=np.nan, right=np.nan",
        "left=None, right=None",
        f"{COMPARISON_FIGURES} -k seed_counts",
    ),
    Guard(
        "the edge of Adam bounds no plain eigenvalue",
        CURVES,
        "if last == kinds[any(preconditioned in row for row in known)]",
        "if last in kinds",
        f"{COMPARISON_FIGURES} -k edge_is_dashed",
    ),
    Guard(
        "an edge far above takes no room",
        CURVES,
        "edges[edges <= _NEAR * high]",
        "edges",
        f"{COMPARISON_FIGURES} -k far_above",
    ),
    Guard(
        "few curves",
        CURVES,
        "for index in evenly(len(curves), MOST)",
        "for index in range(len(curves))",
        f"{COMPARISON_FIGURES} -k hundreds_of_runs",
    ),
    Guard(
        "numbers that fit in their cells",
        PAIRWISE,
        "letters=min(int((side - 0.02) / 0.07), 5)",
        "letters=9",
        f"{COMPARISON_FIGURES} -k inside_their_cells",
    ),
    # -- batches as one, and an early stop
    Guard(
        "batches are one only where that is the same loss",
        ROUND,
        "whole.loss(), objective.loss()",
        "whole.loss(), whole.loss()",
        f"{JOINING} -k another_loss",
        within="Round._as_one",
    ),
    Guard(
        "batches are one only where there is room",
        ROUND,
        "same = whole.has_room() and torch",
        "same = torch",
        f"{JOINING} -k without_known_room",
    ),
    Guard(
        "batches that have a meaning of their own",
        "callbacks/sharpness.py",
        "return not (self.worst_case and self.per_batch)",
        "return True",
        f"{JOINING} -k worst_case",
    ),
    Guard(
        "statistics of BatchNorm belong to the weights on the way",
        LOSSES,
        "reestimate_batch_norm(pl_module, lambda: [value(held) for held in statistics.batches])",
        "pass",
        f"{INTERPOLATION} -k statistics_on_the_way",
    ),
    Guard(
        "after that estimate the loss is in eval mode",
        LOSSES,
        "isolation.leave_training()",
        "pass",
        f"{INTERPOLATION} -k statistics_on_the_way",
    ),
    Guard(
        "a resumed run goes on from the old reference",
        "callbacks/interpolation.py",
        'elif self.reference == "initial" and self._goes_on(trainer, params):',
        "elif False:",
        f"{INTERPOLATION} -k same_reference",
    ),
    Guard(
        "a reference that holds other weights is refused",
        "training/kept.py",
        'thing.fingerprint() != self.told["hash"]',
        "False",
        f"{INTERPOLATION} -k without_its_file",
    ),
    Guard(
        "a given state dict is not that of the live module",
        "callbacks/reference.py",
        "{name: _copied(t) for name, t in",
        "{name: t for name, t in",
        f"{INTERPOLATION} -k live_module",
    ),
    Guard(
        "the reference holds what is unfrozen later",
        "callbacks/interpolation.py",
        "params = self._params(pl_module)",
        "params = measured",
        f"{INTERPOLATION} -k unfrozen_later",
        within="InterpolationMonitor.begin",
    ),
    Guard(
        "three on one line cost the plane only",
        "callbacks/interpolation.py",
        "except NoPlane as error:",
        "except ZeroDivisionError as error:",
        f"{INTERPOLATION} -k on_one_line",
    ),
    Guard(
        "a plane is paid for as a picture",
        "callbacks/interpolation.py",
        "self.draws = third is not None",
        "self.draws = False",
        f"{INTERPOLATION} -k is_a_picture",
    ),
    Guard(
        "the copy at the start of an epoch is paid for",
        SESSION,
        "with self._paying(pl_module):",
        "if True:",
        f"{INTERPOLATION} -k is_paid_for",
        within="Session.on_train_epoch_start",
    ),
    Guard(
        "statistics are estimated in train mode",
        "geometry/batch_norm.py",
        "module.train()",
        "pass",
        "tests/geometry/test_interpolation.py -k in_eval_mode_is",
        within="reestimate_batch_norm",
    ),
    Guard(
        "a runner-up that is hardly known forbids an early stop",
        "geometry/eigen.py",
        "by_error = exact and seen",
        "by_error = exact",
        f"{SAVINGS} -k crossing",
    ),
    Guard(
        "the next eigenvalue is taken as large as may be",
        "geometry/eigen.py",
        "gaps = values[:k] - (values[k] + residuals[k])",
        "gaps = values[:k] - values[k]",
        f"{SAVINGS} -k an_estimated_error",
    ),
    # -- two probes of equal standing
    Guard(
        "as many training as validation examples",
        GENERALIZATION,
        "wanted = min(map(sum, sizes))",
        "wanted = max(map(sum, sizes))",
        f"{GAP} -k test_values",
    ),
    Guard(
        "no validation example twice",
        GENERALIZATION,
        "self.further_probe.forget()  # the same",
        "pass  # the same",
        f"{GAP} -k test_capture",
    ),
    Guard(
        "a complete validation probe costs nothing",
        GENERALIZATION,
        "rest(self, [VALIDATION_BATCH_START], GeneralizationMonitor)",
        "pass",
        f"{GAP} -k idle",
    ),
    Guard(
        "the first values of a fit that ends with its first validation",
        GENERALIZATION,
        "return not self.measured",
        "return False",
        f"{GAP} -k ends_with",
    ),
    Guard(
        "the validation probe of the run before",
        GENERALIZATION,
        'self._kept_validation.told = state_dict.get("validation_probe")',
        "pass",
        f"{GAP} -k resumed",
    ),
    Guard(
        "the mean per example of a summed loss",
        ROUND,
        "reduction=reduction,",
        'reduction="mean",',
        f"{GAP} -k summed",
        within="Round._terms",
    ),
    Guard(
        "weights of batches of unlike size",
        MEANS,
        "metric.update(x.clone(), weight=n.clone())",
        "metric.update(x.clone())",
        f"{GAP} -k numpy",
    ),
    Guard(
        "the spread about the mean, not about zero",
        MEANS,
        "(n * (x - mean)).square()",
        "((n * x).square() - (n * mean).square())",
        f"{GAP} -k numpy",
    ),
    Guard(
        "the means of all processes",
        MEANS,
        "distributed_available_fn=lambda: processes.count > 1",
        "distributed_available_fn=lambda: False",
        f"{GAP_OF_TWO} -k one_gap",
    ),
    Guard(
        "processes with unlike numbers of validation batches",
        PROBES,
        "probe.complete = closed_on == self._processes.count and size > 0",
        "probe.complete = probe.closed and probe.size > 0",
        f"{GAP_OF_TWO} -k one_gap",
    ),
    # -- finished models
    Guard(
        "the step of a checkpoint within an epoch",
        SAVED,
        "step = counter + int(within)",
        "step = counter",
        f"{MEASURED} -k the_step",
    ),
    Guard(
        "the step of a checkpoint while gradients accumulate",
        SAVED,
        "if module.automatic_optimization else step",
        "if False else step",
        f"{MEASURED} -k the_step",
    ),
    Guard(
        "files of other people are not unpickled",
        SAVED,
        'map_location="cpu", weights_only=True',
        'map_location="cpu", weights_only=False',
        f"{MEASURED} -k read_safely",
    ),
    Guard(
        "a finished model is not trained",
        OFFLINE,
        "trainer.should_stop = True",
        "pass",
        f"{MEASURED} -k no_batch",
    ),
    Guard(
        "the epoch of a checkpoint",
        OFFLINE,
        'loop.epoch_progress.current.completed = int(self._checkpoint["epoch"])',
        "pass",
        f"{MEASURED} -k stands",
    ),
    Guard(
        "what is about a step is left out of a finished model",
        ROUND,
        "return self._session.trains",
        "return True",
        f"{MEASURED} -k about_a_step",
    ),
    Guard(
        "the edge of a summed loss on a finished model",
        SESSION,
        "self.account.batch_size = batch_size(training[0])",
        "pass",
        f"{MEASURED} -k summed",
    ),
    Guard(
        "the residual of the ratio, with one step size for all",
        EDGE_RATIO,
        "step * float(plain.residuals[0]) / 2",
        "step * float(plain.residuals[0])",
        "tests/geometry/test_edge_ratio.py -k residual",
    ),
    Guard(
        "the residual of the ratio, with a preconditioner",
        EDGE_RATIO,
        "float(solved.residuals[0]) / 2",
        "float(plain.residuals[0]) / 2",
        "tests/geometry/test_edge_ratio.py -k residual",
    ),
    Guard(
        "a value within its residual is told",
        HESSIAN,
        "elif residual > abs(value):",
        "elif residual < 0.0:",
        f"{OPTIONS} -k within_its_residual",
    ),
    Guard(
        "the residuals of all eigenvalues",
        HESSIAN,
        "float(solved.eigenvalues[index]), float(solved.residuals[index])",
        "float(solved.eigenvalues[index]), 0.0",
        f"{OPTIONS} -k residuals_of_all",
    ),
    # -- wrong uses
    Guard(
        "True is no count",
        "geometry/checks.py",
        "isinstance(value, bool)",
        "False",
        f"{BAD_CALLS} -k every_n_train_steps",
        within="check_count",
    ),
    Guard(
        "text is no number",
        "geometry/checks.py",
        "isinstance(value, (bool, np.bool_, str, bytes))",
        "isinstance(value, (bool, np.bool_))",
        f"{BAD_CALLS} -k max_overhead",
    ),
    Guard(
        "patterns that match nothing end the run before it trains",
        "training/monitor.py",
        "raise ValueError(problem)",
        "self.say_once(problem)",
        f"{BAD_RUNS} -k lyer",
        within="Monitor.fits",
    ),
    Guard(
        "a callback that measures in one Trainer is not taken by another",
        "training/monitor.py",
        'other.state.status == "running"',
        "False",
        f"{BAD_RUNS} -k measures",
    ),
    Guard(
        "a file that cannot be written is told once, not at each step",
        RECORDS,
        'whose or re.sub(r"\\d+", "#", what)',
        "whose or what",
        f"{BAD_RUNS} -k cannot_be_written",
    ),
    Guard(
        "a probe in the place of one that was given up is kept",
        "training/monitor.py",
        "if probe.captured and not kept.names(probe):",
        "if probe.captured and not self.measured:",
        f"{RESUME} -k kept_in_its_turn",
    ),
    Guard(
        "what a probe that was given up lay in is no file of the new one",
        PROBE,
        "self.closed, self.file = [], False, False, None",
        "self.closed = [], False, False",
        "tests/training/test_altered.py -k lacks",
    ),
    Guard(
        "where a kept probe was found is told on",
        "training/kept.py",
        'self.told is not None and self.told["file"] == thing.file',
        "self.told is not None",
        f"{RESUME} -k moved",
    ),
    Guard(
        "what a checkpoint tells wrongly of a probe",
        "training/kept.py",
        'return all(isinstance(value.get(part), str) for part in ("file", "hash"))',
        "return True",
        f"{BAD_RUNS} -k tells_wrongly",
    ),
    # -- files of strangers
    Guard(
        "a kept probe is not unpickled",
        PROBE,
        "rows = torch.load(path, weights_only=True",
        "rows = torch.load(path, weights_only=False",
        f"{SAFETY} -k resumed",
    ),
    Guard(
        "a kept reference is not unpickled",
        "callbacks/reference.py",
        "weights_only=True",
        "weights_only=False",
        f"{SAFETY} -k resumed",
    ),
    Guard(
        "weights that are given are not unpickled",
        "callbacks/between.py",
        'cpu", weights_only=True)',
        'cpu", weights_only=False)',
        f"{SAFETY} -k given",
    ),
    Guard(
        "a slice is not unpickled",
        "geometry/slices.py",
        "np.load(path, allow_pickle=False)",
        "np.load(path, allow_pickle=True)",
        f"{SAFETY} -k archives",
    ),
    Guard(
        "a density is not unpickled",
        "geometry/spectrum.py",
        "np.load(path, allow_pickle=False)",
        "np.load(path, allow_pickle=True)",
        f"{SAFETY} -k archives",
    ),
    Guard(
        "an archive in a report is not unpickled",
        "report/run.py",
        "np.load(path, allow_pickle=False)",
        "np.load(path, allow_pickle=True)",
        f"{SAFETY} -k archives",
    ),
]
