//! The options that containerd gives a runtime: which configuration is used.
//!
//! `ConfigPath` among the options of the runtime in containerd's own configuration arrives as a path; without it, all the options there are, as the text of a
//! configuration (containerd's `internal/cri/config`, `GenerateRuntimeOptions`). Both are containerd's, which is trusted.

use containerd_shim::protos::protobuf::well_known_types::any::Any;
use containerd_shim::protos::protobuf::{CodedInputStream, Result as ProtobufResult};
use kvrun_pod::config::Source;
use kvrun_pod::text;

use crate::error::Error;

/// The message that is understood (containerd's `api/types/runtimeoptions/v1/api.proto`).
const OPTIONS: &str = "runtimeoptions.v1.Options";
/// What a text of containerd's is called.
const BODY: &str = "options of containerd";

/// The configuration that the options name.
pub(crate) fn source(options: &Any) -> Result<Source, Error> {
    if options.value.is_empty() {
        return Ok(Source::Default);
    }
    // Some put a host before the name, as typeurl does not mind.
    if options.type_url.rsplit('/').next() != Some(OPTIONS) {
        let kind = text::one_line(&options.type_url, 128);
        return Err(Error::Invalid(format!(
            "options of type {kind} are not for this runtime, which takes ConfigPath ({OPTIONS}): remove them"
        )));
    }
    let (path, body) = parse(&options.value)
        .map_err(|error| Error::Invalid(format!("options of type {OPTIONS}: {error}")))?;
    if !path.is_empty() {
        return if path.starts_with('/') {
            Ok(Source::File(path.into()))
        } else {
            Err(Error::Invalid(format!("ConfigPath {:?} is not absolute", text::one_line(&path, 256))))
        };
    }
    if body.is_empty() {
        return Ok(Source::Default);
    }
    let text = String::from_utf8(body).map_err(|_| Error::Invalid(format!("{BODY} are not UTF-8")))?;
    Ok(Source::Text { name: BODY, text })
}

/// `config_path` and `config_body`. What is not known is passed over, as protobuf wants it.
fn parse(bytes: &[u8]) -> ProtobufResult<(String, Vec<u8>)> {
    let (mut path, mut body) = (String::new(), Vec::new());
    let mut input = CodedInputStream::from_bytes(bytes);
    while let Some(tag) = input.read_raw_tag_or_eof()? {
        // The number of the field, and 2: bytes with their length.
        match tag {
            0x12 => path = input.read_string()?,
            0x1a => body = input.read_bytes()?,
            other => containerd_shim::protos::protobuf::rt::skip_field_for_tag(other, &mut input)?,
        }
    }
    Ok((path, body))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn source_of(kind: &str, value: &[u8]) -> Result<Source, Error> {
        source(&Any { type_url: kind.into(), value: value.into(), ..Default::default() })
    }

    #[test]
    fn path_comes_before_text_and_neither_is_the_default() {
        let text = |text: &str| Source::Text { name: BODY, text: text.into() };
        assert_eq!(source_of("", b"").unwrap(), Source::Default);
        assert_eq!(source_of(OPTIONS, b"\x0a\x01t").unwrap(), Source::Default);
        assert_eq!(source_of(OPTIONS, b"\x12\x02/c").unwrap(), Source::File("/c".into()));
        assert_eq!(source_of(OPTIONS, b"\x1a\x03a=1").unwrap(), text("a=1"));
        assert_eq!(source_of(OPTIONS, b"\x1a\x03a=1\x12\x02/c").unwrap(), Source::File("/c".into()));
        // Another host, and a field of a later version.
        assert_eq!(source_of("types/runtimeoptions.v1.Options", b"\x20\x01").unwrap(), Source::Default);
    }

    #[test]
    fn what_is_not_understood_is_refused() {
        for (kind, value, words) in [
            (
                "containerd.runc.v1.Options",
                &b"\x08\x01"[..],
                "containerd.runc.v1.Options are not for this runtime",
            ),
            (OPTIONS, b"\x12\x05/c", "options of type"),
            (OPTIONS, b"\x12\x01c", "is not absolute"),
            (OPTIONS, b"\x1a\x01\xff", "not UTF-8"),
        ] {
            let error = source_of(kind, value).unwrap_err().to_string();
            assert!(error.contains(words), "{error}");
        }
    }
}
