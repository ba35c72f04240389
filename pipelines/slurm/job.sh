# Read by the job scripts of this folder (`. pipelines/slurm/job.sh`): the study, its stages, and how they run.
#
# Stages run by `dvc repro -s`, so that a job has the commands of dvc.yaml, leaves a stage that is up to date alone, and
# records what it made. Before the time limit Slurm sends SIGUSR1: the work ends as by Ctrl-C and the job is requeued,
# to continue from its last shard or checkpoint.

die() {
  echo "error: $*" >&2
  exit 1
}

[ -f dvc.yaml ] || die "$PWD has no dvc.yaml: submit in the root of the clone, sbatch pipelines/slurm/NAME.sbatch STUDY"
study=${1-}
[ -f "$study/dvc.yaml" ] || die "STUDY '$study' has no dvc.yaml: expected a folder such as studies/hubert-base-ls960"
shift
# The environment of README.md, if the job did not inherit one.
if [ -f .venv/bin/activate ]; then . .venv/bin/activate; fi

# Print the instances of a stage, such as `interleaved` of train@interleaved: of an array job the one of this task.
instances() {
  local all
  mapfile -t all < <(dvc stage list --name-only "$study/dvc.yaml" | sed -n "s/.*\b$1@//p")
  ((${#all[@]})) || die "$study/dvc.yaml has no stage $1"
  if [ -z "${SLURM_ARRAY_TASK_ID-}" ]; then
    printf '%s\n' "${all[@]}"
  else
    ((SLURM_ARRAY_TASK_ID < ${#all[@]})) ||
      die "array task $SLURM_ARRAY_TASK_ID: stage $1 has ${#all[@]} instances; submit with --array=0-$((${#all[@]} - 1))"
    echo "${all[SLURM_ARRAY_TASK_ID]}"
  fi
}

# Run stages one after another. workers: process that they need, which does not end before them.
run_stages() {
  set -m # a process group of its own, which SIGINT reaches as Ctrl-C does
  # Jobs of one clone share DVC's lock, which each holds for moments only.
  dvc --wait-for-lock repro -s "${@/#/$study/dvc.yaml:}" &
  work=$!
  set +m
  # SLURM_JOB_ID of an array's last task is the whole array's.
  local job=${SLURM_ARRAY_JOB_ID:+${SLURM_ARRAY_JOB_ID}_$SLURM_ARRAY_TASK_ID}
  trap "stop_work; scontrol requeue ${job:-${SLURM_JOB_ID-}}; exit" USR1
  trap 'stop_work; die "stopped; the same sbatch command resumes"' TERM
  wait -n "$work" ${workers-} || true
  if kill -0 "$work" 2>/dev/null; then
    stop_work
    die "the workers have ended; their lines are above"
  fi
  wait "$work"
}

stop_work() {
  trap '' TERM # of the job's end, while the work ends
  kill -INT -- "-$work" || true
  wait "$work" || true
}
