"""The operators that an uploaded model may contain, as plain names in families.

A list of what is allowed, not of what is forbidden: an operator that a later torch adds is refused until someone
has read what it does. Left out on purpose: whatever reaches files (`aten::save`, `aten::from_file`), the network or
other processes (`rpc`, `c10d`, `aten::to_here`), Python (`prim::PythonOp`), the profiler, raw storage
(`aten::set_`, `aten::resize_`, `aten::set_data`), the seed of the process (`aten::seed`), quantized and sparse
kernels, backward formulas, vendor kernels and every namespace but `aten` and `prim`.
"""

# Products, norms, decompositions.
_LINEAR_ALGEBRA = """
    addbmm addmm addmv addr adjoint baddbmm bilinear bmm cdist chain_matmul cholesky cholesky_inverse cholesky_solve
    cross det dist dot einsum frobenius_norm ger inner inverse kron linalg__powsum linalg_cholesky
    linalg_cholesky_ex linalg_cond linalg_cross linalg_det linalg_diagonal linalg_eig linalg_eigh linalg_eigvals
    linalg_eigvalsh linalg_householder_product linalg_inv linalg_inv_ex linalg_ldl_factor linalg_ldl_factor_ex
    linalg_ldl_solve linalg_lstsq linalg_lu linalg_lu_factor linalg_lu_factor_ex linalg_lu_solve linalg_matmul
    linalg_matrix_exp linalg_matrix_norm linalg_matrix_power linalg_matrix_rank linalg_multi_dot linalg_norm
    linalg_pinv linalg_qr linalg_slogdet linalg_solve linalg_solve_ex linalg_solve_triangular linalg_svd
    linalg_svdvals linalg_tensorinv linalg_tensorsolve linalg_vander linalg_vecdot linalg_vector_norm logdet
    lu_solve lu_unpack mH mT matmul matrix_H matrix_exp matrix_power mm mv native_norm norm norm_except_dim
    nuclear_norm numpy_T orgqr ormqr outer pairwise_distance pdist pinverse qr renorm slogdet svd t tensordot trace
    triangular_solve vander vdot
"""

# torch.special.
_SPECIAL_FUNCTIONS = """
    special_airy_ai special_bessel_j0 special_bessel_j1 special_bessel_y0 special_bessel_y1
    special_chebyshev_polynomial_t special_chebyshev_polynomial_u special_chebyshev_polynomial_v
    special_chebyshev_polynomial_w special_digamma special_entr special_erf special_erfc special_erfcx
    special_erfinv special_exp2 special_expit special_expm1 special_gammainc special_gammaincc special_gammaln
    special_hermite_polynomial_h special_hermite_polynomial_he special_i0 special_i0e special_i1 special_i1e
    special_laguerre_polynomial_l special_legendre_polynomial_p special_log1p special_log_ndtr special_log_softmax
    special_logit special_logsumexp special_modified_bessel_i0 special_modified_bessel_i1 special_modified_bessel_k0
    special_modified_bessel_k1 special_multigammaln special_ndtr special_ndtri special_polygamma special_psi
    special_round special_scaled_modified_bessel_k0 special_scaled_modified_bessel_k1
    special_shifted_chebyshev_polynomial_t special_shifted_chebyshev_polynomial_u
    special_shifted_chebyshev_polynomial_v special_shifted_chebyshev_polynomial_w special_sinc special_softmax
    special_spherical_bessel_j0 special_xlog1py special_xlogy special_zeta
"""

# Transforms and their windows.
_FOURIER = """
    bartlett_window blackman_window fft_fft fft_fft2 fft_fftfreq fft_fftn fft_fftshift fft_hfft fft_hfft2 fft_hfftn
    fft_ifft fft_ifft2 fft_ifftn fft_ifftshift fft_ihfft fft_ihfft2 fft_ihfftn fft_irfft fft_irfft2 fft_irfftn
    fft_rfft fft_rfft2 fft_rfftfreq fft_rfftn hamming_window hann_window istft kaiser_window stft
"""

# What torch.nn.functional is made of.
_NEURAL_NETWORK = """
    adaptive_avg_pool1d adaptive_avg_pool2d adaptive_avg_pool3d adaptive_max_pool1d adaptive_max_pool2d
    adaptive_max_pool3d affine_grid_generator alpha_dropout avg_pool1d avg_pool2d avg_pool3d batch_norm
    binary_cross_entropy binary_cross_entropy_with_logits celu channel_shuffle col2im constant_pad_nd conv1d conv2d
    conv3d conv_tbc conv_transpose1d conv_transpose2d conv_transpose3d convolution cosine_embedding_loss
    cosine_similarity cross_entropy_loss ctc_loss dropout elu embedding embedding_bag
    fake_quantize_per_channel_affine fake_quantize_per_tensor_affine feature_alpha_dropout feature_dropout
    fractional_max_pool2d fractional_max_pool3d gelu glu grid_sampler grid_sampler_2d grid_sampler_3d group_norm gru
    gru_cell hardshrink hardsigmoid hardswish hardtanh hinge_embedding_loss huber_loss im2col instance_norm kl_div
    l1_loss layer_norm leaky_relu linear log_sigmoid log_sigmoid_forward log_softmax logit lstm lstm_cell
    margin_ranking_loss max_pool1d max_pool1d_with_indices max_pool2d max_pool2d_with_indices max_pool3d
    max_pool3d_with_indices max_unpool2d max_unpool3d mish mse_loss multi_margin_loss multilabel_margin_loss
    multilabel_margin_loss_forward native_channel_shuffle native_dropout native_group_norm native_layer_norm
    nll_loss nll_loss2d nll_loss2d_forward nll_loss_forward nll_loss_nd one_hot pad pad_sequence pixel_shuffle
    pixel_unshuffle poisson_nll_loss prelu reflection_pad1d reflection_pad2d reflection_pad3d relu relu6
    replication_pad1d replication_pad2d replication_pad3d rms_norm rnn_relu rnn_relu_cell rnn_tanh rnn_tanh_cell
    rrelu rrelu_with_noise rrelu_with_noise_functional scaled_dot_product_attention selu sigmoid silu smooth_l1_loss
    soft_margin_loss softmax softplus softshrink tanh threshold to_padded_tensor triplet_margin_loss unfold
    upsample_bicubic2d upsample_bilinear2d upsample_linear1d upsample_nearest1d upsample_nearest2d
    upsample_nearest3d upsample_trilinear3d
"""

# Methods of str, list and dict; they touch values only.
_STRINGS_AND_CONTAINERS = """
    Delete append bin capitalize center chr clear count degrees dict endswith expandtabs extend find format get hash
    hex index insert isalnum isalpha isdecimal isdigit isidentifier islower isnumeric isprintable isspace istitle
    isupper item items join keys len list ljust lower lstrip oct ord partition percentFormat pop popitem remove
    replace reverse rfind rindex rjust rpartition rsplit rstrip setdefault sorted splitlines startswith str strip
    swapcase title update upper values zfill
"""

# Conversions to Python numbers, questions about tensors, warnings, grad mode.
_SCALARS_AND_STATE = """
    Bool Complex ComplexImplicit Float FloatImplicit Int IntImplicit ScalarImplicit Size _version can_cast data detach
    device dim divmod element_size equal fabs factorial floordiv gamma gcd get_autocast_dtype get_device grad
    has_torch_function is_autocast_cpu_enabled is_autocast_enabled is_complex is_conj is_contiguous
    is_floating_point is_grad_enabled is_inference is_leaf is_neg is_non_overlapping_and_dense is_nonzero is_pinned
    is_same_size is_scripting is_signed manual_seed mathremainder modf numel promote_types radians requires_grad_
    result_type retains_grad set_grad_enabled size stride wait warn
"""

# Draws from the generator of the process.
_RANDOM = """
    bernoulli binomial cauchy exponential geometric log_normal multinomial normal normal_functional poisson rand
    rand_like randint randint_like randn randn_like random randperm uniform
"""

# New tensors, copies, dtype and device changes.
_CREATION = """
    arange as_tensor clone complex contiguous cpu cuda empty empty_like empty_permuted empty_strided eye full
    full_like lift_fresh linspace logspace new_empty new_empty_strided new_full new_ones new_zeros ones ones_like
    polar range scalar_tensor tensor to to_dense tril_indices triu_indices type_as zeros zeros_like
"""

# Views, joins, indexing, sorting.
_SHAPE_AND_INDEX = """
    alias argsort argwhere as_strided atleast_1d atleast_2d atleast_3d bincount block_diag broadcast_shapes
    broadcast_tensors broadcast_to bucketize cartesian_prod cat chunk column_stack combinations concat concatenate
    diag diag_embed diagflat diagonal diagonal_scatter dsplit dstack expand expand_as fill fill_diagonal_ flatten
    flatten_dense_tensors flip fliplr flipud gather histc histogram histogramdd hsplit hstack index index_add
    index_copy index_fill index_put index_reduce index_select isin kthvalue masked_fill masked_scatter masked_select
    meshgrid moveaxis movedim msort narrow nonzero nonzero_numpy nonzero_static permute positive put ravel repeat
    repeat_interleave reshape reshape_as resolve_conj resolve_neg roll rot90 row_stack scatter scatter_add
    scatter_reduce searchsorted segment_reduce select select_scatter slice slice_scatter sort split split_with_sizes
    squeeze stack swapaxes swapdims take take_along_dim tensor_split tile topk transpose tril triu unbind unflatten
    unflatten_dense_tensors unique_consecutive unique_dim unique_dim_consecutive unsafe_chunk unsafe_split
    unsafe_split_with_sizes unsqueeze values view view_as view_as_complex view_as_real vsplit vstack where zero
"""

# Reductions and scans.
_REDUCTIONS = """
    all allclose amax amin aminmax any argmax argmin corrcoef count_nonzero cov cummax cummin cumprod cumsum
    cumulative_trapezoid diff gradient logcumsumexp logsumexp max mean median min mode nanmean nanmedian nanquantile
    nansum prod quantile std std_mean sum sum_to_size trapezoid trapz var var_mean
"""

# Element by element, on tensors and numbers.
_ELEMENTWISE = """
    abs absolute acos acosh add addcdiv addcmul angle arccos arccosh arcsin arcsinh arctan arctan2 arctanh asin
    asinh atan atan2 atanh bitwise_and bitwise_left_shift bitwise_not bitwise_or bitwise_right_shift bitwise_xor
    ceil chalf clamp clamp_max clamp_min clip conj conj_physical copysign cos cosh deg2rad digamma div divide eq erf
    erfc erfinv exp exp2 expm1 fix float_power floor floor_divide fmax fmin fmod frac frexp ge greater greater_equal
    gt heaviside hypot i0 igamma igammac imag isclose isfinite isinf isnan isneginf isposinf isreal lcm ldexp le
    lerp less less_equal lgamma log log10 log1p log2 logaddexp logaddexp2 logical_and logical_not logical_or
    logical_xor lt maximum minimum mul multiply mvlgamma nan_to_num ne neg negative nextafter not_equal polygamma
    pow rad2deg real reciprocal remainder round rsqrt rsub sgn sign signbit sin sinc sinh sqrt square sub subtract
    tan true_divide trunc xlogy
"""

# Names with an underscore that honest scripts and traces contain: operators of Python syntax, and what
# nn.functional, casts and traces are lowered to.
_INTERNAL = """
    __and__ __contains__ __derive_index __getitem__ __iand__ __ilshift__ __interpolate __ior__ __irshift__ __is__
    __isnot__ __ixor__ __lshift__ __not__ __or__ __range_length __round_to_zero_floordiv __rshift__ __upsample
    __upsample_bilinear __upsample_nearest __xor__ _adaptive_avg_pool2d _adaptive_avg_pool3d _assert_async
    _assert_scalar _assert_tensor_metadata _autocast_to_full_precision _autocast_to_reduced_precision _cast_Byte
    _cast_Char _cast_Double _cast_Float _cast_Half _cast_Int _cast_Long _cast_Short _conj _convolution
    _convolution_mode _ctc_loss _dim_arange _embedding_bag _fft_c2c _fft_c2r _fft_r2c _get_tracing_state
    _grad_sum_to_size _infer_size _list_to_tensor _local_scalar_dense _log_softmax _native_multi_head_attention
    _nested_tensor_from_mask _nested_tensor_from_mask_left_aligned _no_grad_embedding_renorm_ _no_grad_fill_
    _no_grad_normal_ _no_grad_uniform_ _no_grad_zero_ _pack_padded_sequence _pack_sequence _pad_circular _pad_enum
    _pad_packed_sequence _reshape_from_tensor _set_item _shape_as_tensor _size_if_not_equal _softmax _stack
    _standard_gamma _tensor_to_list _to_copy _transformer_encoder_layer_fwd _trilinear _unique _unique2 _unsafe_view
    _unwrap_optional _upsample_bicubic2d_aa _upsample_bilinear2d_aa _upsample_lanczos2d_aa _upsample_nearest_exact1d
    _upsample_nearest_exact2d _upsample_nearest_exact3d _weight_norm _weight_norm_interface
"""

# Control flow, construction and access to values; calls are followed into what they call.
_PRIM = """
    AutogradZero BroadcastSizes CallFunction CallMethod Closure Constant ConstantChunk CreateObject DictConstruct
    Enter EnumName EnumValue Exit GetAttr If ListConstruct ListUnpack Load Loop ModuleContainerIndex NumToTensor
    Print RaiseException SetAttr Store StringIndex TupleConstruct TupleIndex TupleSlice TupleUnpack Uninitialized
    VarConcat VarStack abs awaitable awaitable_nowait awaitable_wait data device dtype fork grad id index is_cpu
    is_cuda is_ipu is_maia is_meta is_mkldnn is_mps is_mtia is_nested is_quantized is_sparse is_sparse_csr is_vulkan
    is_xla is_xpu isinstance itemsize layout max min name nbytes rangelist requires_grad tolist type unchecked_cast
    unchecked_unwrap_optional unpackRefs
"""

# An in-place operator `name_` writes to its first argument alone, so it stands or falls with `name`.
_ATEN = " ".join(
    (
        _LINEAR_ALGEBRA,
        _SPECIAL_FUNCTIONS,
        _FOURIER,
        _NEURAL_NETWORK,
        _STRINGS_AND_CONTAINERS,
        _SCALARS_AND_STATE,
        _RANDOM,
        _CREATION,
        _SHAPE_AND_INDEX,
        _REDUCTIONS,
        _ELEMENTWISE,
        _INTERNAL,
    )
).split()

ALLOWED_OPERATORS: frozenset[str] = frozenset(
    [f"aten::{name}" for name in _ATEN]
    + [f"aten::{name}_" for name in _ATEN if not name.endswith("_")]
    + ["aten::fill_diagonal_", "aten::copy_"]
    + [f"prim::{name}" for name in _PRIM.split()]
)
