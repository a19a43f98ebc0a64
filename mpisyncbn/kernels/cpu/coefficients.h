// The coefficients for the loops, from Python's vectors. Part of module.cpp.

using Vector = nb::ndarray<const double, nb::ndim<1>, nb::c_contig, nb::device::cpu>;
using Output = nb::ndarray<double, nb::ndim<2>, nb::c_contig, nb::device::cpu>;

// The values of a vector of parameters of any dtype and stride; null if it is absent. `which`, 0 or
// 1, chooses the memory for them.
const double *values_of(const Array &vector, long length, int which) {
    if (!vector.data) return nullptr;
    static thread_local std::vector<double> memory[2];
    memory[which].resize(length);
    double *const values = memory[which].data();
    if (vector.dtype == DType::f32)
        for (long c = 0; c < length; ++c) values[c] = ((const float *)vector.data)[c * vector.stride[0]];
    else
        for (long c = 0; c < length; ++c) values[c] = vector[c];
    return values;
}

// Whether x - mean, multiplied twice by invstd, stays within float32 for any dy. An invstd of 0
// stands for a constant channel, and NaN for one with values that are not finite, for which a wider
// type would not help.
bool is_ordinary(double invstd) { return invstd == 0 || !(invstd < 0x1p-30 || invstd > 0x1p30); }
bool fits_float(double number) { return !(std::fabs(number) >= 0x1p127); }

// The coefficients of each channel, computed in double and rounded once. Sets `extreme` if one is
// beyond float32. The loops subtract MEAN, the rounded mean, and SHIFT and INTERCEPT make up for
// the rest of the mean.
template <class T>
const compute_t<T> *coefficients_of(const Plan<T> &plan, const Vector &mean, const Vector &invstd,
                                    const Array &weight, const Array &bias, const double *mean_dy,
                                    const double *mean_dy_xmu, bool &extreme) {
    using W = compute_t<T>;
    const long columns = plan.traversals[0].columns, stride = padded(columns);
    W *const all = caller_scratch<W>(KINDS * stride);
    W *__restrict means_out = all + MEAN * stride, *__restrict scales = all + SCALE * stride;
    W *__restrict shifts = all + SHIFT * stride, *__restrict slopes = all + SLOPE * stride,
                  *__restrict intercepts = all + INTERCEPT * stride;
    const double *const means = mean.data(), *const invstds = invstd.data();
    const double *const weights = values_of(weight, plan.channels, 0), *const biases =
                                                                           values_of(bias, plan.channels, 1);
    bool beyond = false;
    for (long c = 0; c < plan.channels; ++c) {
        const W center = (W)means[c];
        const double mean_lo = means[c] - (double)center,
                     scale = weights ? invstds[c] * weights[c] : invstds[c];
        means_out[c] = center;
        scales[c] = (W)scale;
        shifts[c] = (W)((biases ? biases[c] : 0.0) - mean_lo * scale);
        if (sizeof(W) < 8) beyond |= !is_ordinary(invstds[c]) | !fits_float(scale);
    }
    if (mean_dy)
        for (long c = 0; c < plan.channels; ++c) {
            const double mean_lo = means[c] - (double)means_out[c],
                         scale = weights ? invstds[c] * weights[c] : invstds[c];
            const double slope = -scale * (invstds[c] * (invstds[c] * mean_dy_xmu[c]));
            slopes[c] = (W)slope;
            intercepts[c] = (W)(-scale * mean_dy[c] - mean_lo * slope);
            if (sizeof(W) < 8) beyond |= std::isfinite(mean_dy_xmu[c]) && !fits_float(slope);
        }
    extreme = beyond;
    for (int kind = 0; kind < (mean_dy ? KINDS : SLOPE); ++kind) {
        W *row = all + kind * stride;
        for (long c = plan.channels; c < columns; ++c) row[c] = row[c - plan.channels];
        std::fill(row + columns, row + stride, W(0));
    }
    return all;
}
