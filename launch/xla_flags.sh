# shellcheck shell=bash
# Compiler flags per generation of accelerator, all in one place. Source it before Python starts:
#
#   . launch/xla_flags.sh v5e          # v4, v5e, v5p, v6e, tpu7x, h100
#
# TPU flags go to LIBTPU_INIT_ARGS, GPU flags to XLA_FLAGS. Flags that are set already come last, so they win. A flag that
# the installed libtpu or jaxlib does not know ends the process at its start; tests/launch holds every line against the
# locked versions.

# Gathers of sharded parameters and reductions of gradients run while the matrix unit works on something else: without
# this a layer waits for its weights. `multiple_steps` lets one collective span several fusions, which a gather of a
# layer's weights needs as it takes longer than any single matmul.
overlap=(
    --xla_enable_async_all_gather=true
    --xla_tpu_overlap_compute_collective_tc=true
    --xla_tpu_enable_async_collective_fusion=true
    --xla_tpu_enable_async_collective_fusion_multiple_steps=true
)
# Gradients that are summed over the `data` axis (several slices, or data parallelism beside FSDP): start each sum as
# soon as its gradient is there instead of all at the end, also if they differ in size.
data_parallel=(
    --xla_tpu_enable_data_parallel_all_reduce_opt=true
    --xla_tpu_data_parallel_opt_different_sized_ops=true
)

xla_flags_v4() {
    # Two cores per chip share one program (megacore); gathers fused across both stall on the slower one. Fusing gathers
    # into matmuls, as on v5e and v5p, has not been compiled for this generation.
    tpu=("${overlap[@]}" "${data_parallel[@]}"
        --xla_tpu_enable_async_collective_fusion_fuse_all_gather=false
        --xla_tpu_megacore_fusion_allow_ags=false)
}

xla_flags_v5e() {
    # One core, a 2D torus and slow links: gathers are fused into matmuls. Decomposed (windowed, "collective") matmuls
    # lose more than they hide on this torus, so their threshold in MiB is out of reach. Of 128 MiB of VMEM, fusions may
    # use 48 (the default is 16): SwiGLU's gradient and matmuls get larger tiles. By the compiler's cycles, a 7B step with
    # 8 rows per chip and everything rematerialised computes for 4.62 s in place of 4.78 with 24 MiB; with one row the step
    # takes 0.739 s in place of 0.758. Compiling takes 220 to 450 CPU-seconds, about twice as many.
    tpu=("${overlap[@]}" "${data_parallel[@]}"
        --xla_tpu_enable_async_collective_fusion_fuse_all_gather=true
        --xla_jf_spmd_threshold_for_windowed_einsum_mib=100000
        --xla_tpu_scoped_vmem_limit_kib=49152)
}

xla_flags_v5p() {
    # As v4: megacore, 3D torus. Of more VMEM, fusions may use 24 MiB (the default is 16): matmuls get larger tiles, by
    # the compiler's cycles 3 to 16 % of a 7B step; 32 MiB win little more and take three times as long to compile.
    # Gathers fused into matmuls hide 59 % of a 7B step's all-gathers (85 % with one row per chip and everything
    # rematerialised), which nothing hides without it: 1.6 % of the step. Reduce-scatters stay alone, here and on v5e:
    # --xla_tpu_enable_async_collective_fusion_fuse_reduce_scatter hides none of them.
    tpu=("${overlap[@]}" "${data_parallel[@]}"
        --xla_tpu_enable_async_collective_fusion_fuse_all_gather=true
        --xla_tpu_megacore_fusion_allow_ags=false
        --xla_tpu_scoped_vmem_limit_kib=24576)
}

xla_flags_v6e() {
    # 128 MiB of VMEM: a fusion may use 96 of them (the default is 32), so that larger tiles of a matmul stay on chip.
    tpu=("${overlap[@]}" "${data_parallel[@]}"
        --xla_tpu_enable_async_collective_fusion_fuse_all_gather=false
        --xla_tpu_scoped_vmem_limit_kib=98304)
}

xla_flags_tpu7x() {
    # Only what hides collectives: no other flag has been tried on this generation.
    tpu=("${overlap[@]}" "${data_parallel[@]}")
}

xla_flags_h100() {
    # The scheduler that starts collectives early; gathers, reduce-scatters and sums pipelined over the iterations of
    # the loop over layers, which double buffering gives the room for; small collectives combined into large ones,
    # which NVLink and InfiniBand need for their bandwidth.
    gpu=(--xla_gpu_enable_latency_hiding_scheduler=true
        --xla_gpu_enable_pipelined_all_gather=true
        --xla_gpu_enable_pipelined_reduce_scatter=true
        --xla_gpu_enable_pipelined_all_reduce=true
        --xla_gpu_enable_while_loop_double_buffering=true
        --xla_gpu_all_gather_combine_threshold_bytes=1073741824
        --xla_gpu_reduce_scatter_combine_threshold_bytes=536870912
        --xla_gpu_all_reduce_combine_threshold_bytes=134217728)
    # The rest is for NCCL and cuBLAS; JAX's default of 0.75 is for machines that somebody else uses too.
    export XLA_PYTHON_CLIENT_MEM_FRACTION="${XLA_PYTHON_CLIENT_MEM_FRACTION:-0.92}"
}

tpu=() gpu=()
case "${1:-}" in
    v4 | v5e | v5p | v6e | tpu7x | h100) "xla_flags_$1" ;;
    *) echo "xla_flags.sh: the generation must be v4, v5e, v5p, v6e, tpu7x or h100, got '${1:-}'" >&2; return 2 ;;
esac
if [ ${#tpu[@]} -gt 0 ]; then export LIBTPU_INIT_ARGS="${tpu[*]}${LIBTPU_INIT_ARGS:+ $LIBTPU_INIT_ARGS}"; fi
if [ ${#gpu[@]} -gt 0 ]; then export XLA_FLAGS="${gpu[*]}${XLA_FLAGS:+ $XLA_FLAGS}"; fi
