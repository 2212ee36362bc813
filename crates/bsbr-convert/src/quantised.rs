//! Marks of checkpoints whose numbers are codes: keys of `config.json` and ends of names.

use serde_json::Value;

use crate::ConvertError;
use crate::json::ConfigFile;
use crate::scaled::Form;

/// Keys that describe how a checkpoint is quantised. The second is of MLX, the third of an older compressed-tensors.
const KEYS: [&str; 3] = ["quantization_config", "quantization", "compression_config"];

/// Ends of the names that quantised weights have instead of `.weight`, or beside it, by the programs that write them.
const ENDS: &[&str] = &[
    // Scales of FP8 and of compressed-tensors.
    ".weight_scale",
    ".weight_scale_inv",
    ".weight_scale_2",
    ".weight_packed",
    ".weight_zero_point",
    ".input_scale",
    // GPTQ, AWQ, EETQ, and the one after them.
    ".qweight",
    ".qzeros",
    ".g_idx",
    ".scales",
    ".weight_scales",
    // MLX, with the scales above.
    ".biases",
    // bitsandbytes.
    ".absmax",
    ".quant_map",
    ".nested_absmax",
    ".nested_quant_map",
    ".quant_state",
    ".SCB",
    ".weight_format",
    // HQQ.
    ".W_q",
    // Quanto.
    ".weight._scale",
    ".weight._data",
    // ExLlama 2 and 3.
    ".q_weight",
    ".q_scale",
    ".q_invperm",
    ".trellis",
    // AQLM, VPTQ, QuIP#.
    ".codebooks",
    ".codes",
    ".centroids",
    ".Qidxs",
];

/// What in `config.json` says that the weights are quantised in a way that is not read.
///
/// # Errors
///
/// [`ConvertError::ConfigKey`] where such a key holds no object.
pub(crate) fn in_config(config: &ConfigFile) -> Result<Option<String>, ConvertError> {
    for key in KEYS {
        let Some(settings) = config.object(key)? else { continue };
        if key == KEYS[0] && Form::of(config)?.is_some() {
            continue;
        }
        let text = |key: &str| settings.get(key).map(|value| value.as_str().map_or(value.to_string(), str::to_owned));
        let mut how: Vec<String> = ["quant_method", "format", "mode"].into_iter().filter_map(text).collect();
        let bits = ["bits", "num_bits", "w_bit"].into_iter().find_map(|key| settings.get(key).and_then(Value::as_u64));
        how.extend(bits.map(|bits| format!("{bits} bits")));
        let how = if how.is_empty() { "unknown method".to_owned() } else { how.join(", ") };
        return Ok(Some(format!("config.json has a `{key}`: {how}")));
    }
    Ok(None)
}

/// Whether a tensor of this name belongs to a quantised weight.
pub(crate) fn is_name_of_codes(name: &str) -> bool {
    ENDS.iter().any(|end| name.ends_with(end)) || name.contains(".quant_state.")
}
